"""Images and captions in Parquet files: bytes, or paths of files beside them (the layout of Hugging Face's `datasets`).

The image column is the first of `IMAGE_COLUMNS` in the file: bytes of an image file, a struct with `bytes` or `path`,
or a path relative to the folder of the Parquet file, inside of it. The caption column, the first of `CAPTION_COLUMNS`,
may be missing.
"""

from collections import OrderedDict
from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np

from tokenizers_mm._check import fail, require
from tokenizers_mm._images import decode_image, decode_size, read_image, read_size
from tokenizers_mm.data.codes import parquet_file, row_group
from tokenizers_mm.data.files import FileList
from tokenizers_mm.data.image_sets import Sample, digest
from tokenizers_mm.data.order import BlockOrder

IMAGE_COLUMNS = (
    "image",
    "img",
    "jpg",
    "png",
    "webp",
    "bytes",
    "path",
    "image_path",
    "file_name",
    "file",
)
CAPTION_COLUMNS = ("caption", "text", "txt", "prompt")
NAME_COLUMNS = ("name", "key", "__key__", "id", "file_name")

WINDOW = 4
"""Row groups whose rows are shuffled together, and that a process keeps in memory."""


class ParquetImages:
    """Rows of Parquet files, in the order of the files. Row groups are read whole, the last `WINDOW` are kept."""

    def __init__(self, files: FileList | Sequence[Path], root: Path) -> None:
        self.files, self.root = files, root
        self.groups: list[tuple[int, int, int]] = []  # number of the file, of the row group in it, rows
        self.columns: list[dict[str, str]] = []
        for number, path in enumerate(files):
            counts, columns = _read_footer(path)
            self.columns.append(columns)
            self.groups += [(number, group, count) for group, count in enumerate(counts) if count > 0]
        self.ends = np.array(list(accumulate(count for *_, count in self.groups)), dtype=np.int64)
        require(len(self.ends) > 0, "images", "Parquet files with rows", str(root))
        self._kept: OrderedDict[int, list[dict[str, Any]]] = OrderedDict()
        self._order = BlockOrder([count for *_, count in self.groups], WINDOW)

    def __len__(self) -> int:
        return int(self.ends[-1])

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_kept": OrderedDict()}

    def _row(self, index: int) -> tuple[int, dict[str, Any]]:
        """Number of the file of a row, and the row: image, caption, name."""
        require(0 <= index < len(self), "index", f"0 to {len(self) - 1}", index)
        group = int(np.searchsorted(self.ends, index, side="right"))
        number, place, count = self.groups[group]
        if group not in self._kept:
            self._kept[group] = _read_rows(self.files[number], place, self.columns[number])
            while len(self._kept) > WINDOW:
                self._kept.popitem(last=False)
        self._kept.move_to_end(group)
        rows = self._kept[group]
        require(len(rows) == count, f"images {self.files[number]}", "the file as it was opened", "another one")
        return number, rows[index - (int(self.ends[group]) - count)]

    def name(self, index: int) -> str:
        number, row = self._row(index)
        stem = self.files[number].relative_to(self.root).with_suffix("").as_posix()
        value = row["image"]
        path = value if isinstance(value, str) else value.get("path") if isinstance(value, dict) else None
        name = row.get("name", path)
        return f"{stem}/{name if isinstance(name, (str, int)) and str(name) else f'{index:08d}'}"

    def read(self, index: int) -> Sample:
        name, image = self._image(index)
        caption = self._row(index)[1].get("caption")
        skipped = [] if caption is None or isinstance(caption, str) else [f"caption of {name}: expected text"]
        made = decode_image(image, name) if isinstance(image, bytes) else read_image(image)
        return Sample(made, caption.strip() if isinstance(caption, str) else "", skipped)

    def shape(self, index: int) -> tuple[int, int]:
        name, image = self._image(index)
        return decode_size(image, name) if isinstance(image, bytes) else read_size(image)

    def order(self, position: int, seed: int) -> int | None:
        """Rows of `WINDOW` row groups shuffled together, the row groups in a new order in every pass."""
        return self._order(position, seed)

    def fingerprint(self) -> str:
        stats = ((path.relative_to(self.root), path.stat()) for path in self.files)
        return digest(f"{name} {stat.st_size} {stat.st_mtime_ns}" for name, stat in stats)

    def _image(self, index: int) -> tuple[str, bytes | Path]:
        """Name of an image in errors, and its bytes or its path."""
        number, row = self._row(index)
        path = self.files[number]
        name, value = f"image {path} row {index}", row["image"]
        if isinstance(value, dict):
            value = value.get("bytes") or value.get("path")
        if isinstance(value, bytes) and value:
            return name, value
        if not isinstance(value, str) or not 0 < len(value) <= 4096 or "\0" in value:
            fail(name, "bytes or a path", value)
        try:
            inside = (path.parent / value).resolve().is_relative_to(path.parent.resolve())
        except (OSError, RuntimeError) as error:  # links that lead to themselves, names that are too long
            fail(name, "the path of an image", str(error))
        require(inside, name, f"a path inside of {path.parent}", value)
        return name, path.parent / value


def _read_footer(path: Path) -> tuple[list[int], dict[str, str]]:
    """Rows of every row group, and the columns for image, caption and name."""
    with parquet_file(path, f"images {path}") as file:
        names = file.schema_arrow.names
        counts = [file.metadata.row_group(number).num_rows for number in range(file.num_row_groups)]
    require(all(0 <= count < 1 << 31 for count in counts), f"images {path}", "numbers of rows", counts)
    wanted = {"image": IMAGE_COLUMNS, "caption": CAPTION_COLUMNS, "name": NAME_COLUMNS}
    columns = {key: next((name for name in options if name in names), "") for key, options in wanted.items()}
    if not columns["image"]:
        fail(f"images {path}", f"a column with images ({', '.join(IMAGE_COLUMNS)})", names)
    return counts, {key: name for key, name in columns.items() if name}


def _read_rows(path: Path, group: int, columns: dict[str, str]) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    with parquet_file(path, f"images {path}") as file:
        for batch in row_group(file, group, list(dict.fromkeys(columns.values())), f"images {path}"):
            table = batch.to_pydict()
            values = zip(*(table[name] for name in columns.values()), strict=True)
            rows += [dict(zip(columns, row, strict=True)) for row in values]
    return rows
