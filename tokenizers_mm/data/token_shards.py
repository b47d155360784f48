"""Shards of ids on disk: writing one, and reading a folder of them for training.

A folder of shards holds files `part-00000.tar` (webdataset), `part-00000.parquet` or `part-00000.jsonl`, the file
`_manifest.json` once all are there, and a hidden folder with a small JSON file per finished shard. In a tar file every
image has the members `KEY.ids.npy` (or `KEY.latents.npy`) and `KEY.json` (name, caption, height, width, for latents the
grid, and the tokenizer that made them); KEY is the number of the image in the whole input. Parquet shards have the
columns of `data.codes`. JSON lines are records of `llm.records`, rows as they came with codes in place of images; in
tar and Parquet shards they are the member `KEY.json` and the column `record`.
"""

import io
import json
import tarfile
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any

from tokenizers_mm._check import fail, require
from tokenizers_mm._files import atomic_path, regular_file
from tokenizers_mm._origin import OriginCheck, origin_facts, read_origin
from tokenizers_mm.data.codes import (
    CodesOfImage,
    array_bytes,
    array_from_bytes,
    check_place,
    import_arrow,
    parquet_file,
    read_codes,
    read_parquet_codes,
    row_group,
    write_codes,
)
from tokenizers_mm.data.order import BlockOrder
from tokenizers_mm.data.tar_members import read_members

MANIFEST, DONE = "_manifest.json", ".tokenizers_mm"
"""File beside finished shards, and folder of the files about single ones; readers of data sets pass over both
names."""

SHARD_ENDINGS = {"webdataset": ".tar", "parquet": ".parquet", "jsonl": ".jsonl", "npz": ".npz"}
"""Endings of shards by format; the last one is for the parts of `tokenizers-mm encode`."""

MAX_MEMBER = 1 << 28
"""Bytes of a member of a shard, or of a line, that is read."""

MAX_ROWS = 1 << 31
"""Rows of one shard at most."""

Row = CodesOfImage | dict[str, Any]
"""Row of a shard: the codes of an image, or a record."""


def write_shard(path: Path, rows: Sequence[tuple[int, Row]], origin: str, largest: int = 0) -> None:
    """Write rows with their numbers, in order; the same rows give the same bytes.

    origin: `fingerprint()` of the tokenizer. largest: the largest id that it has, so that all shards have ids of one
    kind.
    """
    if path.suffix == ".tar":
        with atomic_path(path) as temporary, tarfile.open(temporary, "w", format=tarfile.USTAR_FORMAT) as archive:
            for key, row in rows:
                for ending, data in _members(row, origin, largest):
                    member = tarfile.TarInfo(f"{key:09d}.{ending}")
                    member.size, member.mode = len(data), 0o644
                    archive.addfile(member, io.BytesIO(data))
    elif path.suffix == ".jsonl":
        with atomic_path(path) as temporary, temporary.open("wb") as stream:
            for _, row in rows:
                stream.write(_json(row) + b"\n")
    elif rows and isinstance(rows[0][1], dict):
        arrow = import_arrow()
        texts = [_json(row).decode() for _, row in rows]
        with atomic_path(path) as temporary:
            arrow.parquet.write_table(arrow.table({"record": arrow.array(texts, arrow.string())}), temporary)
    else:
        write_codes(path, [row for _, row in rows if isinstance(row, CodesOfImage)], origin, largest or None)


def _members(row: Row, origin: str, largest: int) -> Iterator[tuple[str, bytes]]:
    if isinstance(row, dict):
        yield "json", _json(row)
        return
    facts: dict[str, Any] = {"name": row.name, "caption": row.caption, "height": row.height, "width": row.width}
    if row.grid is not None:
        facts |= {"rows": row.grid[0], "columns": row.grid[1]}
    facts |= origin_facts(origin)
    yield ("ids.npy" if row.grid is None else "latents.npy"), array_bytes(row.values, largest)
    yield "json", _json(facts)


def _json(value: Any) -> bytes:
    return json.dumps(value, ensure_ascii=False).encode("utf-8", errors="surrogatepass")


def read_shard(path: Path) -> Iterator[Row]:
    """The rows of a shard, in order; ValueError names the file and what is wrong with it."""
    if path.suffix == ".parquet":
        yield from _read_parquet(path)
    elif path.suffix == ".jsonl":
        with regular_file(path, "a JSONL file").open("rb") as stream:
            while line := stream.readline(MAX_MEMBER):
                yield _parsed(line, str(path))
    elif path.suffix == ".tar":
        yield from _read_tar(path)
    else:
        yield from read_codes(path)


def _read_parquet(path: Path) -> Iterator[Row]:
    with parquet_file(path, f"shard {path}") as file:
        if "record" not in file.schema_arrow.names:
            yield from read_parquet_codes(path)
            return
        for group in range(file.num_row_groups):
            for batch in row_group(file, group, ["record"], f"shard {path}"):
                for text in batch["record"].to_pylist():
                    require(isinstance(text, str), f"shard {path}", "records as text", text)
                    yield _parsed(text.encode(), str(path))


def _read_tar(path: Path) -> Iterator[Row]:
    name = f"shard {path}"
    waiting: dict[str, bytes] = {}
    key = ""
    for member, archive in read_members(path):
        stem, _, ending = member.name.partition(".")
        if ending not in ("json", "ids.npy", "latents.npy"):
            continue
        require(member.size <= MAX_MEMBER, name, f"members of at most {MAX_MEMBER} bytes", member.size)
        if stem != key and waiting:
            yield _from_members(waiting, f"{name} {key}")
            waiting = {}
        require(ending not in waiting, f"{name} {stem}", "members with names of their own", f"{ending} again")
        key = stem
        stream = archive.extractfile(member)
        waiting[ending] = b"" if stream is None else stream.read()
    if waiting:
        yield _from_members(waiting, f"{name} {key}")


def _from_members(members: dict[str, bytes], name: str) -> Row:
    facts = _parsed(members.get("json", b""), name)
    arrays = [ending for ending in members if ending != "json"]
    if not arrays:
        return facts
    values = array_from_bytes(members[arrays[0]], name)
    latents = arrays[0] == "latents.npy"
    place = [facts.get(side) for side in (("height", "width", "rows", "columns") if latents else ("height", "width"))]
    require(values.is_floating_point() == latents and values.ndim == 1 + latents, name, "ids or latents", values)
    return check_place(name, values, place, facts.get("name"), facts.get("caption"), read_origin(facts))


def _parsed(data: bytes, name: str) -> dict[str, Any]:
    try:
        found = json.loads(data.decode("utf-8", errors="surrogatepass"))
    except (ValueError, RecursionError) as error:
        fail(name, "JSON", str(error))
    if not isinstance(found, dict):
        fail(name, "a JSON mapping", found)
    return found


def shard_files(folder: Path) -> list[Path]:
    """The shards of a folder, in order; ValueError where there are none, or some are missing."""
    require(folder.is_dir(), f"shards {folder}", "a folder of shards", "something else")
    endings = set(SHARD_ENDINGS.values())
    found = sorted(path for path in folder.glob("part-*") if path.suffix in endings)
    require(len(found) > 0, f"shards {folder}", f"files part-*{'|'.join(sorted(endings))}", "none")
    return found


def read_shards(path: Path) -> Iterator[Row]:
    """All rows of a file or a folder of shards."""
    for file in shard_files(path) if path.is_dir() else [path]:
        yield from read_shard(file)


def read_manifest(folder: Path) -> dict[str, Any]:
    """`_manifest.json` of a folder of finished shards."""
    path = folder / MANIFEST
    require(path.is_file() and path.stat().st_size <= MAX_MEMBER, str(path), "the manifest of finished shards", "none")
    return _parsed(path.read_bytes(), str(path))


class TokenShards:
    """Rows of a folder of finished shards by number, a `torch.utils.data` map-style data set.

    A row is a mapping: of an image `ids` int64 [L] (or `latents` float [L, D]), `height`, `width`, `name`, `caption`;
    of a record its own keys. Whole shards are read; the last few are kept. `shuffled` orders that stay in a shard for a
    while (`order`) are therefore fast, others are not.

    tokenizer: the image tokenizer that is to decode the ids, or whose ids a model learned; shards of another one are
    then refused, unless `any_tokenizer`.
    """

    KEPT = 4

    def __init__(self, folder: str | Path, tokenizer: Any = None, any_tokenizer: bool = False) -> None:
        self.folder = Path(folder)
        self.manifest = read_manifest(self.folder)
        if tokenizer is not None:
            OriginCheck(tokenizer, any_tokenizer)(str(folder), read_origin(self.manifest))
        where = f"{folder}/{MANIFEST}"
        shards = self.manifest.get("shards")
        listed = isinstance(shards, list) and all(isinstance(shard, dict) for shard in shards)
        require(listed, where, "a list of shards", shards)
        assert isinstance(shards, list)
        found = [(shard.get("file"), shard.get("rows")) for shard in shards]
        sound = all(isinstance(name, str) and type(rows) is int and 0 <= rows <= MAX_ROWS for name, rows in found)
        require(sound, where, f"shards with a file and 0 to {MAX_ROWS} rows", found)
        self.files = [(name, rows) for name, rows in found if rows]
        require(len(self.files) > 0, where, "shards with rows", "none")
        plain = all(Path(name).name == name and "\0" not in name for name, _ in self.files)
        require(plain, where, "names of files in the folder", self.files)
        self.ends = list(accumulate(rows for _, rows in self.files))
        self._kept: dict[int, list[Row]] = {}
        self._order = BlockOrder([rows for _, rows in self.files])

    def __len__(self) -> int:
        return self.ends[-1] if self.ends else 0

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_kept": {}}

    def __getitem__(self, index: int) -> dict[str, Any]:
        if not 0 <= index < len(self):
            raise IndexError(index)
        number = bisect_right(self.ends, index)
        name, count = self.files[number]
        if number not in self._kept:
            while len(self._kept) >= self.KEPT:
                self._kept.pop(next(iter(self._kept)))
            self._kept[number] = list(read_shard(self.folder / name))
        rows = self._kept[number]
        require(len(rows) == count, f"shard {self.folder / name}", f"{count} rows, as in {MANIFEST}", len(rows))
        row = rows[index - (self.ends[number] - count)]
        if isinstance(row, dict):
            return row
        kind = "ids" if row.grid is None else "latents"
        facts = {"height": row.height, "width": row.width, "name": row.name, "caption": row.caption}
        return {kind: row.values, **facts, **({} if row.grid is None else {"grid": row.grid})}

    def order(self, position: int, seed: int) -> int:
        """Index at a position of endless passes: shards in a new order in every pass, rows shuffled inside of each."""
        return self._order(position, seed)
