"""Files of codes: what `tokenizers-mm encode` writes and `decode` reads, `.safetensors`, `.npz` or `.parquet`.

Images of one size: `ids` int64 [B, L] or `latents` float [B, L, D]. Images of several sizes: the rows of all images one
after the other, `ids` [N] or `latents` [N, D]; `offsets` int64 [B + 1], where each image begins and the last one ends;
`sizes` int64 [B, 2], height and width; for latents `grids` int64 [B, 2], rows and columns. The texts beside the tensors
(in an `.npz` the array `metadata`, JSON) are `names` and, where there are any, `captions` (JSON lists), and
for one size `height`, `width` and for latents `rows` and `columns`.

A `.parquet` file has a row per image: `name`, `caption`, `height`, `width`, and `ids` (a list of int32, or int64 for
ids that need it), or `latents` (a list of float32, row-major), `rows` and `columns`.

The metadata of all three say which tokenizer made the codes: `family`, and `tokenizer` (see `_origin`).

Everything is written and, from Parquet, read a few images at a time.
"""

import io
import json
import struct
import tokenize
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from tokenizers_mm._check import expecting, fail, require
from tokenizers_mm._files import atomic_path, file_place, kind_of, regular_file
from tokenizers_mm._images import MAX_PIXELS
from tokenizers_mm._origin import origin_facts, read_origin
from tokenizers_mm._safetensors import file_start
from tokenizers_mm.types import ImageCodes, ImageLatents, Stream, as_ids

ENDINGS = (".safetensors", ".npz", ".parquet")

ROW_GROUP = 1024
"""Images of a row group of a Parquet file."""

BATCH_ROWS = 64
"""Rows of a Parquet file that are unpacked at a time."""

MAX_ROW_GROUP = 1 << 30
"""Bytes of a row group that is read."""

BROKEN = (
    *(SafetensorError, zipfile.BadZipFile, zlib.error, struct.error, tokenize.TokenError, SyntaxError, MemoryError),
    *(OSError, EOFError, LookupError, TypeError, ValueError, ArithmeticError, RuntimeError, AttributeError),
)
"""Errors of safetensors, zipfile, numpy and pyarrow for files that are broken."""


@dataclass(frozen=True)
class CodesOfImage:
    """The rows of one image: ids int64 [L] or latents float [L, D]; grid is (rows, columns) of latents.

    name: relative path or another text that tells the image. caption: "" for none. origin: the tokenizer that made
    them, as a file tells it (see `_origin`); "" where it does not.
    """

    values: Tensor
    height: int
    width: int
    grid: tuple[int, int] | None
    name: str = ""
    caption: str = ""
    origin: str = ""

    @classmethod
    def of(cls, codes: ImageCodes | ImageLatents, name: str = "", caption: str = "") -> "CodesOfImage":
        """A batch of one image, on the CPU."""
        return cls.each(codes, [(name, caption)])[0]

    @classmethod
    def each(
        cls, codes: ImageCodes | ImageLatents, texts: Sequence[tuple[str, str]] | None = None
    ) -> "list[CodesOfImage]":
        """The images of a batch, on the CPU. texts: name and caption of each."""
        grid = codes.grid if isinstance(codes, ImageLatents) else None
        rows = (codes.values if isinstance(codes, ImageLatents) else codes.ids).cpu().unbind()
        named = zip(rows, texts or [("", "")] * len(rows), strict=True)
        return [cls(row, codes.height, codes.width, grid, *text) for row, text in named]

    def is_like(self, other: "CodesOfImage") -> bool:
        """True if the codes of both can be one batch."""
        places = [(item.height, item.width, item.grid, item.values.shape) for item in (self, other)]
        return places[0] == places[1]

    def codes(self, streams: Callable[[int, int], tuple[Stream, ...]]) -> ImageCodes | ImageLatents:
        """As a batch of one image. streams: of the tokenizer, by height and width."""
        if self.grid is not None:
            return ImageLatents(self.values[None], self.height, self.width, self.grid)
        return ImageCodes(self.values[None], self.height, self.width, streams(self.height, self.width))


def check_output(path: Path) -> None:
    """Refuse a file name whose ending says no known format, or a place where no file can be written."""
    require(path.suffix in ENDINGS, "out", f"a file name that ends in {' or '.join(ENDINGS)}", str(path))
    if path.suffix == ".parquet":
        import_arrow()
    file_place(path)


def import_arrow() -> Any:
    """The modules of pyarrow; ValueError that says how to get it."""
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        fail("Parquet", "pyarrow to be installed (pip install 'tokenizers_mm[data]')", "no such package")
    return pyarrow


class _Columns:
    """Facts about all images from a first pass: kinds, sizes and names, but no ids."""

    def __init__(self, items: Iterable[CodesOfImage], largest: int | None) -> None:
        self.names, self.captions = [], []
        self.lengths: list[int] = []
        self.places: list[tuple[int, ...]] = []
        self.largest, self.width, self.dtype = largest or 0, None, torch.int64
        for item in items:
            if not self.names:
                self.width = item.values.shape[1] if item.grid is not None else None
                self.dtype = torch.int64 if self.width is None else item.values.dtype
            other = (item.values.shape[1] if item.grid is not None else None) != self.width
            require(not other, "codes", "ids only, or latents of one width", item.values)
            self.names.append(item.name)
            self.captions.append(item.caption)
            self.lengths.append(len(item.values))
            self.places.append((item.height, item.width, *(item.grid or ())))
            if largest is None and self.width is None:
                self.largest = max(self.largest, int(item.values.max()))
        require(len(self.names) > 0, "codes", "at least one image", "none")

    @property
    def alike(self) -> bool:
        return len(set(zip(self.places, self.lengths, strict=True))) == 1

    def facts(self, origin: str) -> dict[str, str]:
        facts = {**origin_facts(origin), "names": json.dumps(self.names)}
        if any(self.captions):
            facts["captions"] = json.dumps(self.captions)
        if self.alike:
            facts |= dict(zip(("height", "width", "rows", "columns"), map(str, self.places[0]), strict=False))
        return facts

    def index(self) -> dict[str, np.ndarray]:
        """The small arrays for images of several sizes."""
        if self.alike:
            return {}
        places = np.array(self.places, dtype=np.int64)
        offsets = np.concatenate([[0], np.cumsum(self.lengths)]).astype(np.int64)
        arrays = {"offsets": offsets, "sizes": np.ascontiguousarray(places[:, :2])}
        return arrays | ({} if self.width is None else {"grids": np.ascontiguousarray(places[:, 2:])})

    def shape(self) -> tuple[int, ...]:
        first = (len(self.names), self.lengths[0]) if self.alike else (sum(self.lengths),)
        return first if self.width is None else (*first, self.width)


def write_codes(
    path: Path,
    items: Callable[[], Iterable[CodesOfImage]] | Sequence[CodesOfImage],
    origin: str,
    largest: int | None = None,
) -> None:
    """Write the codes of images, in order, whole or not at all.

    items: a sequence, or a function that begins to go through them; it is called twice. origin: `fingerprint()` of the
    tokenizer. largest: the largest id that it has; None looks for the largest of these.
    """
    check_output(path)
    begin = items if callable(items) else lambda: items
    columns = _Columns(begin(), largest)
    with atomic_path(path) as temporary, temporary.open("wb") as stream:
        {".npz": _write_npz, ".parquet": _write_parquet}.get(path.suffix, _write_safetensors)(
            stream, begin(), columns, origin
        )


def _write_safetensors(stream: IO[bytes], items: Iterable[CodesOfImage], columns: _Columns, origin: str) -> None:
    """The rows, then the small arrays."""
    key, index = ("ids" if columns.width is None else "latents"), columns.index()
    dtype = torch.float32 if columns.dtype == torch.bfloat16 else columns.dtype  # as NumPy, which has no other
    entries = {key: (dtype, columns.shape()), **{name: (torch.int64, array.shape) for name, array in index.items()}}
    stream.write(file_start(entries, columns.facts(origin)))
    for item in items:
        stream.write(item.values.to(dtype).contiguous().numpy().tobytes())
    for array in index.values():
        stream.write(array.tobytes())


def _write_npz(stream: IO[bytes], items: Iterable[CodesOfImage], columns: _Columns, origin: str) -> None:
    key, dtype = ("ids", np.int64) if columns.width is None else ("latents", np.float32)
    with zipfile.ZipFile(stream, "w") as archive:
        for name, array in {"metadata": np.array(json.dumps(columns.facts(origin))), **columns.index()}.items():
            with archive.open(zipfile.ZipInfo(f"{name}.npy"), "w", force_zip64=True) as member:
                np.lib.format.write_array(member, np.asarray(array), allow_pickle=False)
        with archive.open(zipfile.ZipInfo(f"{key}.npy"), "w", force_zip64=True) as member:
            descr = np.lib.format.dtype_to_descr(np.dtype(dtype))
            np.lib.format.write_array_header_2_0(
                member, {"descr": descr, "fortran_order": False, "shape": columns.shape()}
            )
            for item in items:
                member.write(item.values.float().numpy().tobytes() if columns.width else item.values.numpy().tobytes())


def _write_parquet(stream: IO[bytes], items: Iterable[CodesOfImage], columns: _Columns, origin: str) -> None:
    arrow = import_arrow()
    schema = parquet_schema(arrow, columns.width, columns.largest, origin_facts(origin))
    with arrow.parquet.ParquetWriter(stream, schema) as writer:
        waiting: list[CodesOfImage] = []
        for item in items:
            waiting.append(item)
            if len(waiting) == ROW_GROUP:
                writer.write_table(_table(arrow, schema, waiting))
                waiting = []
        if waiting:
            writer.write_table(_table(arrow, schema, waiting))


def parquet_schema(arrow: Any, width: int | None, largest: int, facts: Mapping[str, Any]) -> Any:
    """Columns of a Parquet file of codes. width: channels of latents, None for ids. largest: the largest id."""
    text, side = arrow.string(), arrow.int32()
    fields = [("name", text), ("caption", text), ("height", side), ("width", side)]
    if width is None:
        fields.append(("ids", arrow.list_(arrow.int64() if largest > 2**31 - 1 else arrow.int32())))
    else:
        fields += [("rows", side), ("columns", side), ("latents", arrow.list_(arrow.float32()))]
    return arrow.schema(fields, metadata={"tokenizers_mm": json.dumps({**facts, "channels": width})})


def _table(arrow: Any, schema: Any, items: Sequence[CodesOfImage]) -> Any:
    arrays: dict[str, Any] = {
        "name": [item.name for item in items],
        "caption": [item.caption for item in items],
        "height": [item.height for item in items],
        "width": [item.width for item in items],
        "rows": [item.grid[0] if item.grid else None for item in items],
        "columns": [item.grid[1] if item.grid else None for item in items],
    }
    values = [item.values.flatten() for item in items]
    ends = np.concatenate([[0], np.cumsum([len(part) for part in values])]).astype(np.int32)
    flat = torch.cat(values)
    last = schema.field(len(schema) - 1)
    flat = flat.float() if last.name == "latents" else flat
    lists = arrow.ListArray.from_arrays(ends, arrow.array(flat.numpy()).cast(last.type.value_type))
    columns = [arrow.array(arrays[field.name], field.type) for field in list(schema)[:-1]]
    return arrow.Table.from_arrays([*columns, lists], schema=schema)


def read_codes(path: Path) -> Iterator[CodesOfImage]:
    """The codes of each image of a file, checked; ValueError names the file and what is wrong with it."""
    if path.suffix == ".parquet":
        yield from read_parquet_codes(path)
        return
    tensors, facts = _read(path)
    key = "ids" if "ids" in tensors else "latents"
    if key not in tensors:
        fail("ids", "a file that `encode` wrote", str(path))
    values = as_ids(tensors["ids"], name=f"{path}: ids") if key == "ids" else tensors[key]
    name = f"{path}: {key}"
    require(key == "ids" or values.is_floating_point(), name, "floats", values)
    several = {"offsets", "sizes"} <= tensors.keys()
    axes = (1 if several else 2) + (key == "latents")
    require(values.ndim == axes, name, f"{axes} axes", values)
    if not several:
        names = ("height", "width", "rows", "columns")[: 4 if key == "latents" else 2]
        require(all(n in facts for n in names), "ids", "a file that `encode` wrote", f"{path} without {names}")
        texts = [facts[n] for n in names]
        require(all(text.isdecimal() and len(text) < 10 for text in texts), str(path), f"numbers as {names}", texts)
        places = [[int(text) for text in texts]] * len(values)
        parts: Sequence[Tensor] = values.unbind()
    else:
        offsets, sizes, *grids = (
            as_ids(tensors[name], name=f"{path}: {name}") for name in ("offsets", "sizes", "grids") if name in tensors
        )
        wide = [sizes, *grids]
        count = len(offsets) - 1 if offsets.ndim == 1 else -1
        right = count > 0 and all(tuple(t.shape) == (count, 2) for t in wide) and len(wide) == 1 + (key == "latents")
        ends = offsets.flatten().tolist()
        right = right and ends[0] == 0 and ends[-1] == len(values) and ends == sorted(ends)
        require(right, str(path), "offsets and sizes that fit each other", f"offsets {list(offsets.shape)}")
        places = torch.cat(wide, 1).tolist()
        parts = values.split(offsets.diff().tolist())
    names, captions = (_texts(facts, key, len(parts)) for key in ("names", "captions"))
    origin = read_origin(facts)
    for part, place, name, caption in zip(parts, places, names, captions, strict=True):
        yield check_place(str(path), part, place, name, caption, origin)


def check_place(where: str, values: Tensor, place: Sequence[Any], name: Any, caption: Any, origin: str) -> CodesOfImage:
    """The codes of an image from what a file says; place: height and width, and for latents rows and columns."""
    sound = all(type(side) is int and side > 0 for side in place) and place[0] * place[1] <= MAX_PIXELS
    require(sound and len(values) > 0, where, "sizes of images", list(place))
    height, width, *grid = place
    name, caption = (text if isinstance(text, str) else "" for text in (name, caption))
    return CodesOfImage(values, height, width, (grid[0], grid[1]) if grid else None, name, caption, origin)


def _texts(facts: Mapping[str, str], key: str, count: int) -> list[str]:
    """A list of texts beside the tensors; empty texts where it is missing or of another length."""
    try:
        found = json.loads(facts.get(key, "[]"))
    except (ValueError, RecursionError):
        found = []
    right = isinstance(found, list) and len(found) == count and all(isinstance(text, str) for text in found)
    return found if right else [""] * count


@contextmanager
def parquet_file(path: Path, name: str) -> Iterator[Any]:
    """An open Parquet file; all that pyarrow raises of a broken one is one ValueError that begins with `name`."""
    regular_file(path, "a Parquet file")
    with expecting(name, "a whole Parquet file", *BROKEN), import_arrow().parquet.ParquetFile(path) as file:
        yield file


def row_group(file: Any, group: int, columns: Sequence[str], name: str) -> Iterator[Any]:
    """Some columns of a row group, in record batches of a few rows, within `MAX_ROW_GROUP` bytes in all.

    What a footer claims is not believed: values that repeat take no room in a file, but all of it in memory.
    """
    held = 0
    for batch in file.iter_batches(BATCH_ROWS, row_groups=[group], columns=list(columns)):
        held += batch.nbytes
        require(held <= MAX_ROW_GROUP, name, f"row groups of at most {MAX_ROW_GROUP} bytes", "more")
        yield batch


def read_parquet_codes(path: Path) -> Iterator[CodesOfImage]:
    """The codes of each image of a Parquet file, a few rows at a time."""
    with parquet_file(path, f"ids {path}") as file:
        names = set(file.schema_arrow.names)
        key = "ids" if "ids" in names else "latents"
        sides = ("height", "width") if key == "ids" else ("height", "width", "rows", "columns")
        require({key, *sides} <= names, str(path), f"columns {key}, {', '.join(sides)}", sorted(names))
        wanted = [key, *sides, *(name for name in ("name", "caption") if name in names)]
        origin = _parquet_origin(file)
        for group in range(file.num_row_groups):
            for batch in row_group(file, group, wanted, str(path)):
                yield from _rows_of(path, batch.to_pydict(), key, sides, origin)


def _parquet_origin(file: Any) -> str:
    text = (file.schema_arrow.metadata or {}).get(b"tokenizers_mm", b"{}")
    try:
        return read_origin(json.loads(text))
    except (ValueError, RecursionError, AttributeError):  # no JSON, or no mapping
        return ""


def _rows_of(
    path: Path, table: dict[str, list[Any]], key: str, sides: Sequence[str], origin: str
) -> Iterator[CodesOfImage]:
    for index, row in enumerate(table[key]):
        require(isinstance(row, list) and len(row) > 0, f"{path}: {key}", "lists of numbers", row)
        place = [table[side][index] for side in sides]
        name, caption = (table.get(text, [""] * (index + 1))[index] for text in ("name", "caption"))
        values = as_ids(row, name=f"{path}: ids") if key == "ids" else torch.tensor(row, dtype=torch.float32)
        if key == "latents":
            rows, columns = place[2:]
            right = isinstance(rows, int) and isinstance(columns, int) and rows > 0 and columns > 0
            require(right and len(row) % (rows * columns) == 0, f"{path}: latents", "rows x columns vectors", place)
            values = values.view(rows * columns, -1)
        yield check_place(str(path), values, place, name, caption, origin)


def _read(path: Path) -> tuple[dict[str, Tensor], Mapping[str, str]]:
    if not path.is_file():
        fail("ids", "a file that `encode` wrote", f"{kind_of(path)}: {path}")
    try:
        if path.suffix == ".npz":
            return _read_npz(path)
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
            return tensors, file.metadata() or {}
    except BROKEN as error:
        fail("ids", "a whole file that `encode` wrote", f"{path} ({type(error).__name__}: {error})")


def _read_npz(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    with zipfile.ZipFile(path) as archive:
        limit = max(MAX_ROW_GROUP, path.stat().st_size)
        unpacked = sum(member.file_size for member in archive.infolist())
        require(unpacked <= limit, str(path), f"at most {limit} bytes when unpacked", unpacked)
    with path.open("rb") as stream, np.load(stream, allow_pickle=False) as file:
        facts: Any = json.loads(str(file["metadata"])) if "metadata" in file else {}
        arrays = {name: file[name] for name in ("ids", "latents", "offsets", "sizes", "grids") if name in file}
    if not isinstance(facts, dict) or not all(isinstance(value, str) for value in facts.values()):
        raise ValueError("metadata is no mapping of texts")
    return {name: torch.from_numpy(array) for name, array in arrays.items()}, facts


def array_bytes(values: Tensor, largest: int) -> bytes:
    """A tensor as the bytes of an `.npy` file: int32, or int64 if `largest` needs it; float32 for latents."""
    array = values.float().numpy() if values.is_floating_point() else values.numpy()
    if array.dtype == np.int64 and largest < 2**31:
        array = array.astype(np.int32)
    stream = io.BytesIO()
    np.lib.format.write_array(stream, np.ascontiguousarray(array), allow_pickle=False)
    return stream.getvalue()


def array_from_bytes(data: bytes, name: str) -> Tensor:
    """The inverse of `array_bytes`; ValueError with the name for what is no plain array of numbers, or incomplete."""
    stream = io.BytesIO(data)
    try:
        version = np.lib.format.read_magic(stream)
        read = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}[version]
        shape, by_columns, dtype = read(stream)
        array = np.frombuffer(data, dtype, offset=stream.tell()).reshape(shape, order="F" if by_columns else "C")
    except BROKEN as error:
        fail(name, "an .npy file", f"{type(error).__name__}: {error}")
    require(array.dtype.kind in "iuf", name, "an array of numbers", array)
    return torch.from_numpy(array.astype(np.float32 if array.dtype.kind == "f" else np.int64))
