"""Images and captions inside tar files (the layout of webdataset), read at any place without unpacking.

Members that share a name up to the first dot of their file name are one sample: an image, and a caption in `.txt`.
"""

import tarfile
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from tokenizers_mm._check import fail, require
from tokenizers_mm._files import atomic_path, regular_file
from tokenizers_mm._images import decode_image, decode_size
from tokenizers_mm.data.files import EXTENSIONS, FileList
from tokenizers_mm.data.image_sets import Sample, digest
from tokenizers_mm.data.tar_members import read_members

INDEX = ".tokenizers_mm_index.safetensors"
"""File beside the shards with the places of all samples, written where the folder permits; without it every start reads
all headers again. It is renewed when a shard has another name, size or time."""

MAX_MEMBER = 1 << 30
"""Bytes of an image or caption."""


class Shards:
    """Samples of tar files, in the order of their names.

    folder: all below it; or `files` of it alone.
    places: int64 [N, 5]: number of the shard, start and size of the image, start and size of the caption (0: none).
    """

    def __init__(self, folder: str | Path, files: Sequence[Path] | None = None) -> None:
        self.root = Path(folder)
        self.files = FileList.below(folder, (".tar",)) if files is None else files
        self.marks = _marks(self.root, self.files)
        found = _read_index(self.root / INDEX, self.marks, self.files) if files is None else None
        if found is None:
            found = torch.cat([_scan(path, number) for number, path in enumerate(self.files)])
            if files is None:
                _write_index(self.root / INDEX, self.marks, found)
        self.places = found
        require(len(found) > 0, "data.sources.path", f"tar files with images ({', '.join(EXTENSIONS)})", str(folder))

    def __len__(self) -> int:
        return len(self.places)

    def name(self, index: int) -> str:
        """The name of the image inside of its tar file, below the name of that file."""
        number, start, *_ = self.places[index].tolist()
        path = self.files[number]
        member = str(start)
        with suppress(OSError, tarfile.TarError, UnicodeError), open(path, "rb") as file:
            file.seek(max(0, start - tarfile.BLOCKSIZE))
            header = file.read(tarfile.BLOCKSIZE)
            member = tarfile.TarInfo.frombuf(header, "utf-8", "surrogateescape").name or member
        return f"{path.relative_to(self.root).with_suffix('').as_posix()}/{member}"

    def order(self, position: int, seed: int) -> int | None:
        """None: every order is as fast."""
        return None

    def fingerprint(self) -> str:
        """A digest of names, sizes and times of the tar files."""
        return digest(iter([self.marks]))

    def shape(self, index: int) -> tuple[int, int]:
        """Height and width of an image, from its header."""
        name, data, _ = self._bytes(index)
        return decode_size(data, name)

    def read(self, index: int) -> Sample:
        """Image, caption ("" for none), and captions that could not be read; ValueError for an unreadable image."""
        name, data, text = self._bytes(index)
        image = decode_image(data, name)
        try:
            return Sample(image, text.decode("utf-8").strip(), [])
        except UnicodeDecodeError as error:
            byte = f"byte 0x{error.object[error.start]:02x} at {error.start}"
            return Sample(image, "", [f"caption of {name}: expected UTF-8, got {byte}"])

    def _bytes(self, index: int) -> tuple[str, bytes, bytes]:
        """Name of the image in errors, its bytes, and those of its caption."""
        number, start, size, text_start, text_size = self.places[index].tolist()
        path = self.files[number]
        name = f"image {path} at byte {start}"
        require(0 < size <= MAX_MEMBER and text_size <= MAX_MEMBER, name, f"1 to {MAX_MEMBER} bytes", size)
        try:
            with open(path, "rb") as file:
                file.seek(start)
                data = file.read(size)
                file.seek(text_start)
                text = file.read(text_size)
        except OSError as error:
            fail(name, "a tar file that can be read", error.strerror)
        return name, data, text


def _scan(path: Path, number: int) -> Tensor:
    """Places of the samples of one tar file; several images of one name up to the dot are samples of their own."""
    images: dict[tuple[str, str], tuple[int, int]] = {}
    captions: dict[str, tuple[int, int]] = {}
    for member, _ in read_members(path):
        folder, _, name = member.name.rpartition("/")
        stem, _, rest = name.partition(".")
        kind = "." + rest.lower().rpartition(".")[2]
        place = member.offset_data, member.size
        if kind == ".txt":
            captions[f"{folder}/{stem}"] = place
        elif kind in EXTENSIONS and member.size > 0:
            images[f"{folder}/{stem}", rest] = place
    samples = [[number, *place, *captions.get(stem, (0, 0))] for (stem, _), place in images.items()]
    return torch.tensor(samples, dtype=torch.int64).view(-1, 5)


def _marks(root: Path, files: Sequence[Path]) -> str:
    """Names, sizes and times of the shards."""
    stats = [(path.relative_to(root), path.stat()) for path in files]
    return "\n".join(f"{name} {stat.st_size} {stat.st_mtime_ns}" for name, stat in stats)


def _read_index(path: Path, marks: str, files: Sequence[Path]) -> Tensor | None:
    """Places from the index file, None where it is missing, of other shards, or points outside of them."""
    try:
        with safe_open(regular_file(path), framework="pt") as file:
            places = file.get_tensor("places") if (file.metadata() or {}).get("marks") == marks else None
    except (OSError, SafetensorError, ValueError):
        return None
    if places is None or places.ndim != 2 or places.shape[1] != 5 or places.dtype != torch.int64:
        return None
    number, start, size, text_start, text_size = places.unbind(1)
    if bool((places < 0).any()) or bool((number >= len(files)).any()):
        return None
    ends = torch.tensor([file.stat().st_size for file in files])[number]
    inside = (start <= ends) & (size <= ends - start) & (text_start <= ends) & (text_size <= ends - text_start)
    return places if bool(inside.all()) else None


def _write_index(path: Path, marks: str, places: Tensor) -> None:
    try:
        with atomic_path(path) as temporary:
            save_file({"places": places}, temporary, metadata={"marks": marks})
    except (
        OSError,
        ValueError,
    ):  # a folder that is read-only, a name that is no file's: the next start reads the headers again
        return
