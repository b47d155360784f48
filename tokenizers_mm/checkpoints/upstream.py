"""Reading the checkpoints of other code bases, and saying how their tensors become ours.

    with names as published     tensors = read(path)
    one rule per difference     links = link(shapes, rules)          # names of ours -> names as published
    strictly, key by key        ours = take(links, tensors, where, unused=...)
    and the other way           theirs = give(links, ours)           # state dicts and gradients by published name

Nothing is copied before it is written: tensors stay mapped from the file wherever the file allows it.
"""

import argparse
import mmap
import os
import pickle
import pickletools
import re
import shutil
import struct
import sys
import zipfile
import zlib
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tokenizers_mm._check import expecting, fail, require
from tokenizers_mm._files import kind_of, regular_file, temporary_directory
from tokenizers_mm.config import read_json
from tokenizers_mm.models.loading import FLOATS, account, first_few, read_safetensors

WRAPPERS = ("ema", "model_ema", "model", "state_dict")
"""Keys under which training programs keep the weights; the first one present is read."""

SUFFIXES = (".safetensors", ".ckpt", ".pt", ".pth", ".bin")
INDEX = ".index.json"
"""Suffixes of checkpoints, and of the index of a checkpoint in several files."""

FILES = tuple(name + end for name in ("model.safetensors", "pytorch_model.bin") for end in (INDEX, ""))
"""Checkpoints in a downloaded folder, in the order in which they are looked for."""

MAX_UNPACKED = 20
"""Limit of bytes that one byte of a compressed file may stand for; weights compress by less than 2."""

_DAMAGE = (
    *(ArithmeticError, AssertionError, AttributeError, EOFError, LookupError, MemoryError, OSError, RuntimeError),
    *(TypeError, ValueError, struct.error, zipfile.BadZipFile, zlib.error),
)
"""Errors of torch's and Python's readers for files that are truncated or were changed."""

_NO_CONFIGURATION = sys.stdlib_module_names | {"torch", "numpy", "__main__"}

_CALLS = ("REDUCE", "NEWOBJ", "NEWOBJ_EX", "FROZENSET", "OBJ", "INST")
"""Operations of a pickle whose result may be a tuple made of what they take."""

MAX_TUPLE, MAX_PICKLE, LEGACY_PICKLES = 1 << 20, 1 << 28, 5
"""Limits of the values of one tuple, and of the bytes of a pickle; pickles that begin a file of the old format."""

Shape = tuple[int, ...]
Rule = tuple[str, "str | tuple[str | None, ...]"]
"""A regular expression and its replacement; several replacements are parts joined along the first axis."""


@dataclass(frozen=True)
class Link:
    """One tensor of ours and the published tensors it is made of.

    ours, shape: our name and shape. theirs: published names, joined along the first axis; None stands for zeros.
    their_shape: of each published part. change: applied to the joined tensor last; such a link has no way back.
    part: (index, count) where ours is one of `count` equal slices of the published tensor along its first axis; all of
    them are linked.
    """

    ours: str
    shape: Shape
    theirs: tuple[str | None, ...]
    their_shape: Shape
    change: Callable[[Tensor], Tensor] | None = None
    part: tuple[int, int] = (0, 1)


def files_of(path: str | os.PathLike[str], names: Sequence[str] = (), prefixes: Sequence[str] = ()) -> tuple[Path, ...]:
    """The files of a checkpoint: one file, the shards that an index names, or what a downloaded folder holds of these.

    names: files of a folder that are looked for before `FILES`. prefixes: where names of an index begin with one of
    them, only the shards of such tensors are taken; the others need not be there.
    ValueError for a folder with no checkpoint or with several, and for an index that is none.
    """
    place = Path(path)
    if kind_of(place) == "a folder":
        place = _in_folder(place, (*names, *FILES))
    if not place.name.endswith(INDEX):
        return (place,)
    shards = read_json(place).get("weight_map")
    if not isinstance(shards, Mapping) or not shards:
        fail(str(place), "a weight_map with the file of each tensor", "none")
    for shard in shards.values():
        plain = isinstance(shard, str) and Path(shard).name == shard and shard.endswith(SUFFIXES)
        require(plain, f"{place}: weight_map", "names of checkpoint files beside it", repr(shard))
    wanted = {shard for name, shard in shards.items() if name.startswith(tuple(prefixes))}
    return tuple(place.with_name(shard) for shard in sorted(wanted or set(shards.values())))


def _in_folder(folder: Path, names: Sequence[str]) -> Path:
    """The checkpoint of a folder: the first of the names that it has, or its only file with a checkpoint's suffix."""
    for name in names:
        if (folder / name).is_file():
            return folder / name
    found = sorted(path for path in folder.iterdir() if path.suffix in SUFFIXES and path.is_file())
    expected = "one checkpoint in the folder" + (" (give the path of the file)" if found else "")
    require(len(found) == 1, str(folder), expected, first_few(path.name for path in found) or "none")
    return found[0]


def within(tensors: Mapping[str, Tensor], prefixes: Sequence[str]) -> Mapping[str, Tensor]:
    """The tensors under the first prefix that any name has, without it; all as they are where none has."""
    for prefix in prefixes:
        if found := {name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)}:
            return found
    return tensors


def read(
    checkpoint: str | os.PathLike[str] | Sequence[Path],
    wrappers: Sequence[str] = WRAPPERS,
    prefixes: Sequence[str] = (),
) -> dict[str, Tensor]:
    """The tensors of a checkpoint by their published names; checkpoint: a path of any kind, or its `files_of`.

    Where names of a safetensors file begin with one of `prefixes`, the others are left out.
    """
    tensors: dict[str, Tensor] = {}
    for file in files_of(checkpoint) if isinstance(checkpoint, (str, os.PathLike)) else checkpoint:
        part = _read(file, wrappers, prefixes)
        twice = tensors.keys() & part.keys()
        require(not twice, str(file), "other tensors than the shards before it", first_few(sorted(twice)))
        tensors |= part
    return tensors


def _read(path: Path, wrappers: Sequence[str], prefixes: Sequence[str]) -> dict[str, Tensor]:
    """The tensors of one file; `.safetensors`, or a file of `torch.save`.

    Pickles are read with weights_only; beside tensors they may hold an argparse Namespace, and the configuration
    objects of a training program, which are read as plain mappings: no code of theirs is imported or run. Of such a
    file the first of `wrappers` is taken; a bare state dict is read as it is.
    ValueError for a file that is missing, truncated, unsafe, without tensors, or that claims more than it holds.
    """
    file = regular_file(path, "a checkpoint file")
    if file.suffix == ".safetensors":
        return read_safetensors(file, prefixes)
    try:
        with _mappable(file) as (place, sizes):
            _check_tuples(place)
            with torch.serialization.safe_globals(_stand_ins(place)):
                data = torch.load(place, map_location="cpu", weights_only=True, mmap=sizes is not None)
    except pickle.UnpicklingError as error:
        fail(str(file), "a file of torch.save with nothing but weights", _first_line(error))
    except _DAMAGE as error:
        fail(str(file), "a whole file of torch.save", f"{type(error).__name__}: {_first_line(error)}")
    for key in wrappers:
        if isinstance(found := _inside(data, key), Mapping):
            data = found
            break
    if not isinstance(data, Mapping):
        fail(str(file), "named tensors", "it not a tensor")
    named = all(isinstance(name, str) for name in data)
    others = [name for name, value in data.items() if not _is_plain(value)] if named else ["a key that is no text"]
    if not data or others:
        fail(str(file), "named tensors", f"{first_few(others)} not a tensor" if others else "none")
    _check_claims(data, sizes, str(file))
    return {name: t if t.data_ptr() % t.element_size() == 0 else t.clone() for name, t in data.items()}


def _inside(data: Any, path: str) -> Any:
    """The value at `a.b` of nested mappings, None where there is none."""
    for key in path.split("."):
        data = data.get(key) if isinstance(data, Mapping) else None
    return data


def _check_tuples(file: Path) -> None:
    """Refuse pickles whose tuples, written out in full, are endless: their hash as a key would never be computed.

    A tuple that holds another one twice costs a few bytes and doubles the work. The pickles are gone through without
    making any object: of every value on the stack only its size is kept, which is 1 for all but tuples.
    """
    if not zipfile.is_zipfile(file):
        with file.open("rb") as stream, mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as data:
            for _ in range(LEGACY_PICKLES):
                _check_pickle(data)
        return
    with zipfile.ZipFile(file) as archive:
        for record in archive.infolist():
            if record.filename.endswith("data.pkl"):
                size = record.file_size
                require(size <= MAX_PICKLE, record.filename, f"a pickle of at most {MAX_PICKLE} bytes", f"{size}")
                _check_pickle(BytesIO(archive.read(record)))


def _check_pickle(stream: Any) -> None:
    """`_check_tuples` for the pickle at the place of a stream, which is left behind it."""
    mark = -1
    stack: list[int] = []
    memo: dict[int, int] = {}
    argument: Any
    for code, argument, _ in pickletools.genops(stream):
        name, before = code.name, [item.name for item in code.stack_before]
        if name in ("PUT", "BINPUT", "LONG_BINPUT", "MEMOIZE"):
            memo[len(memo) if name == "MEMOIZE" else argument] = stack[-1]
        elif name in ("GET", "BINGET", "LONG_BINGET"):
            stack.append(memo[argument])
        elif name == "MARK":
            stack.append(mark)
        else:
            taken: list[int] = []
            if "mark" in before:
                while (value := stack.pop()) != mark:
                    taken.append(value)
                before = before[: before.index("mark")]
            taken += [stack.pop() for _ in before]
            size = 1 + sum(taken) if "TUPLE" in name or name in _CALLS else taken[-1] if name == "DUP" else 1
            require(size <= MAX_TUPLE, "tuples", f"at most {MAX_TUPLE} values in one", "more")
            stack += [size] * len(code.stack_after)


@contextmanager
def _mappable(file: Path) -> Iterator[tuple[Path, list[int] | None]]:
    """A file that `torch.load` may map, and the sizes of its records in bytes; None for the old format, which is no
    archive and is read as it is.

    Mapping is right only where the records of the archive are stored: from compressed ones torch would take the
    compressed bytes for numbers. Those are unpacked into a temporary file first. A mapped file cannot make memory grow
    beyond it, whatever sizes its pickle claims.
    """
    if not zipfile.is_zipfile(file):
        yield file, None
        return
    size = file.stat().st_size
    with zipfile.ZipFile(file) as archive:
        records = archive.infolist()
        sizes, names = [record.file_size for record in records], {record.filename for record in records}
        require(len(names) == len(records), "records", "different names", "equal ones")
        packed = sum(record.compress_size for record in records)
        require(packed <= size, "records", f"at most the {size} bytes of the file", f"{packed}")
        limit = MAX_UNPACKED * size + (1 << 26)
        require(sum(sizes) <= limit, "records", f"at most {limit} bytes when unpacked", f"{sum(sizes)}")
        if all(record.compress_type == zipfile.ZIP_STORED for record in records):
            yield file, sizes
            return
        with temporary_directory() as folder:
            place = folder / "unpacked.pt"
            with zipfile.ZipFile(place, "w", zipfile.ZIP_STORED) as unpacked:
                for record in records:
                    copy = zipfile.ZipInfo(record.filename)
                    copy.file_size = record.file_size
                    with archive.open(record) as source, unpacked.open(copy, "w") as target:
                        shutil.copyfileobj(source, target, 1 << 20)
            yield place, sizes


def _is_plain(value: Any) -> bool:
    """True if a value is a dense tensor with numbers of its own."""
    dense = isinstance(value, Tensor) and value.layout == torch.strided and value.device.type == "cpu"
    return dense and not value.is_quantized and type(value) in (Tensor, torch.nn.Parameter)


def _check_claims(tensors: Mapping[str, Tensor], sizes: list[int] | None, where: str) -> None:
    """Refuse tensors that are larger than the bytes behind them, and storages that are no whole record of the file."""
    storages: dict[int, int] = {}
    for name, tensor in tensors.items():
        storage = tensor.untyped_storage()
        storages[storage.data_ptr()] = max(storage.nbytes(), storages.get(storage.data_ptr(), 0))
        claimed, held = tensor.numel() * tensor.element_size(), storage.nbytes()
        require(claimed <= held, f"{where}: {name}", f"{claimed} bytes for its shape", f"{held}")
    total, held = sum(t.numel() * t.element_size() for t in tensors.values()), sum(storages.values())
    require(total <= 4 * held, where, "tensors with bytes of their own", f"{total} bytes from {held}")
    if sizes is not None:
        beyond = Counter(size for size in storages.values() if size) - Counter(sizes)
        require(not beyond, where, "tensors that are whole records of the archive", f"sizes {sorted(beyond)[:3]}")


def get(description: Mapping[str, Any], path: str) -> Any:
    """The value at `a.b.c` of a description of sizes; one sentence when it is not there."""
    value: Any = description
    for key in path.split("."):
        if not isinstance(value, Mapping) or value.get(key) is None:
            fail(f"config: {path}", "a value", "nothing")
        value = value[key]
    return value


def description_errors() -> AbstractContextManager[None]:
    """Turn what a wrong type in a description of sizes causes into one sentence."""
    return expecting("config", "sizes in the form of the reference cases")


def link(
    shapes: Mapping[str, Shape], rules: Sequence[Rule], their_shapes: Mapping[str, Shape] | None = None
) -> list[Link]:
    """Links for a model's own names and shapes: every rule is applied in turn (`re.sub`) to the names made so far.

    their_shapes: published shapes by our name where they differ (the parts' shape for a joined tensor); by default the
    parts are equal slices of ours.
    """
    links = []
    for name, shape in shapes.items():
        parts: tuple[str | None, ...] = (name,)
        for pattern, replacement in rules:
            parts = tuple(new for old in parts for new in _rename(old, pattern, replacement))
        default = (shape[0] // len(parts), *shape[1:]) if len(parts) > 1 else shape
        links.append(Link(name, shape, parts, (their_shapes or {}).get(name, default)))
    return links


def take(
    links: Sequence[Link], tensors: Mapping[str, Tensor], where: str, unused: Mapping[str, Shape] | None = None
) -> dict[str, Tensor]:
    """Our tensors from the published ones; every published key must be linked or listed in `unused`, with its shape.

    What needs no joining stays mapped from the file, in its dtype; what is computed is float32.
    """
    expected = {name: item.their_shape for item in links for name in item.theirs if name is not None}
    account({**expected, **(unused or {})}, tensors, where)
    return {item.ours: _joined(item, tensors) for item in links}


def give(links: Sequence[Link], ours: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The published tensors from ours (a state dict, or gradients); parts that stand for zeros are left out."""
    theirs: dict[str, Tensor] = {}
    slices: dict[str | None, list[Tensor]] = {}
    for item in links:
        if item.ours not in ours:
            continue
        require(item.change is None, item.ours, "a tensor that was only joined or reshaped", "one that was recomputed")
        if item.part != (0, 1):
            slices.setdefault(item.theirs[0], []).append(ours[item.ours])
            if len(slices[item.theirs[0]]) == item.part[1]:
                theirs[str(item.theirs[0])] = torch.cat(slices[item.theirs[0]]).reshape(item.their_shape)
            continue
        parts = ours[item.ours].chunk(len(item.theirs)) if len(item.theirs) > 1 else (ours[item.ours],)
        for name, part in zip(item.theirs, parts, strict=True):
            if name is not None:
                theirs[name] = part.reshape(item.their_shape)
    return theirs


def _stand_ins(file: Path) -> list[Any]:
    """Classes that a pickle may ask for: an argparse Namespace, and plain mappings under the names of unknown classes.

    None for names of Python, torch and numpy, which a configuration has no use for: a file that asks for them is
    refused.
    """
    if not zipfile.is_zipfile(file):
        return [argparse.Namespace]
    names = torch.serialization.get_unsafe_globals_in_checkpoint(file)
    unknown = [name for name in names if name.partition(".")[0] not in _NO_CONFIGURATION]
    return [argparse.Namespace, *((OrderedDict, name) for name in unknown)]


def _joined(item: Link, tensors: Mapping[str, Tensor]) -> Tensor:
    zeros = torch.zeros(()).expand(item.their_shape)
    parts = [zeros if name is None else tensors[name] for name in item.theirs]
    for name, part in zip(item.theirs, parts, strict=True):
        known = part.dtype in FLOATS or not part.is_floating_point()
        require(known, f"{name}", "float32, bfloat16, float16 or float64", part)
    tensor = torch.cat(parts) if len(parts) > 1 else parts[0]
    tensor = tensor if item.part == (0, 1) else tensor.chunk(item.part[1])[item.part[0]]
    if item.change is None:
        return tensor.reshape(item.shape)
    return item.change(tensor.float() if tensor.is_floating_point() else tensor)


def _rename(name: str | None, pattern: str, replacement: str | tuple[str | None, ...]) -> tuple[str | None, ...]:
    if name is None or not re.search(pattern, name):
        return (name,)
    if isinstance(replacement, str):
        return (re.sub(pattern, replacement, name),)
    return tuple(None if part is None else re.sub(pattern, part, name) for part in replacement)


def _first_line(error: Exception) -> str:
    """The first sentence of torch's long messages."""
    return str(error).strip().splitlines()[0].split(". ")[0] if str(error).strip() else type(error).__name__
