"""Images of files and folders of any kind as one set."""

from collections.abc import Sequence
from itertools import groupby
from pathlib import Path

from tokenizers_mm._check import fail, require
from tokenizers_mm._files import kind_of
from tokenizers_mm.data.files import EXTENSIONS, FileList
from tokenizers_mm.data.image_sets import ImageFiles, ImageSet, Joined
from tokenizers_mm.data.parquet import ParquetImages
from tokenizers_mm.data.shards import Shards

PACKED = (".tar", ".parquet")
"""Endings of files that hold many images."""


def open_image_set(paths: Sequence[Path]) -> ImageSet:
    """The images of files and folders: image files, tar shards and Parquet files, told by their endings.

    A folder with image files is taken for those, else for its tar files, else for its Parquet files.
    """
    require(len(paths) > 0, "images", "files or folders", "none")
    found: list[tuple[str, ImageSet]] = []
    for packed, group in groupby(paths, lambda path: path.is_dir() or path.suffix.lower() in PACKED):
        members = list(group)
        if packed:
            found += [_open_packed(path) for path in members]
            continue
        folders = {path.parent for path in members}
        found.append(("", ImageFiles(members, folders.pop() if len(folders) == 1 else None)))
    names, sets = zip(*found, strict=True)
    return sets[0] if len(sets) == 1 else Joined(sets, names)


def _open_packed(path: Path) -> tuple[str, ImageSet]:
    """Prefix of the names of images from a folder or a file of many, for use among others, and the images."""
    if path.is_dir():
        return f"{path.name}/", _open_folder(path)
    require(path.is_file(), f"images {path}", "a file", kind_of(path))
    tar = path.suffix.lower() == ".tar"
    return "", Shards(path.parent, [path]) if tar else ParquetImages([path], path.parent)


def _open_folder(folder: Path) -> ImageSet:
    for endings in (EXTENSIONS, (".tar",), (".parquet",)):
        files = FileList.try_below(folder, endings)
        if files is not None:
            if endings is EXTENSIONS:
                return ImageFiles(files)
            return Shards(folder) if endings == (".tar",) else ParquetImages(files, folder)
    fail("images", f"image files ({', '.join(EXTENSIONS)}), .tar or .parquet files below {str(folder)!r}", "none")
