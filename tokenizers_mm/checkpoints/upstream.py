"""Reading the checkpoints of other code bases, and saying how their tensors become ours.

    with names as published     tensors = read(path)
    one rule per difference     links = link(shapes, rules)          # names of ours -> names as published
    strictly, key by key        ours = take(links, tensors, where, unused=...)
    and the other way           theirs = give(links, ours)           # state dicts and gradients by published name

Nothing is copied before it is written: tensors stay mapped from the file wherever the file allows it.
"""

import argparse
import hashlib
import os
import pickle
import re
import sys
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tokenizers_mm._check import fail, require
from tokenizers_mm.models.loading import account, first_few, read_safetensors

WRAPPERS = ("ema", "model_ema", "model", "state_dict")
"""Keys under which training programs keep the weights; the first one present is read."""

_NO_CONFIGURATION = sys.stdlib_module_names | {"torch", "numpy", "__main__"}

Shape = tuple[int, ...]
Rule = tuple[str, "str | tuple[str | None, ...]"]
"""A regular expression and its replacement; several replacements are parts joined along the first axis."""


@dataclass(frozen=True)
class Link:
    """One tensor of ours and the published tensors it is made of.

    ours, shape: our name and shape. theirs: published names, joined along the first axis; None stands for zeros.
    their_shape: of each published part. change: applied to the joined tensor last; such a link has no way back.
    """

    ours: str
    shape: Shape
    theirs: tuple[str | None, ...]
    their_shape: Shape
    change: Callable[[Tensor], Tensor] | None = None


def read(path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """The tensors of a checkpoint by their published names; `.safetensors`, or a file of `torch.save`.

    Pickles are read with weights_only; beside tensors they may hold an argparse Namespace, and the configuration
    objects of a training program, which are read as plain mappings: no code of theirs is imported or run. Of such a
    file the first of `ema`, `model_ema`, `model` and `state_dict` is taken; a bare state dict is read as it is.
    ValueError for a file that is missing, truncated, unsafe or without tensors.
    """
    file = Path(path)
    require(file.is_file(), str(file), "a checkpoint file", "no such file")
    if file.suffix == ".safetensors":
        return read_safetensors(file)
    try:
        with torch.serialization.safe_globals([argparse.Namespace, *_stand_ins(file)]):
            data = torch.load(file, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(file))
    except pickle.UnpicklingError as error:
        fail(str(file), "a file of torch.save with nothing but weights", _first_line(error))
    except (RuntimeError, EOFError, OSError, ValueError, TypeError, KeyError, zipfile.BadZipFile) as error:
        fail(str(file), "a whole file of torch.save", f"{type(error).__name__}: {_first_line(error)}")
    for key in WRAPPERS:
        if isinstance(data, Mapping) and isinstance(data.get(key), Mapping):
            data = data[key]
            break
    others = [str(n) for n, v in data.items() if not isinstance(v, Tensor)] if isinstance(data, Mapping) else ["it"]
    if not data or others:
        fail(str(file), "named tensors", f"{first_few(others)} not a tensor" if others else "none")
    return dict(data)


def sha256(path: str | os.PathLike[str]) -> str:
    """The hexadecimal sha256 of a file."""
    digest = hashlib.sha256()
    with open(path, "rb") as stream:
        while block := stream.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def get(description: Mapping[str, Any], path: str) -> Any:
    """The value at `a.b.c` of a description of sizes; one sentence when it is not there."""
    value: Any = description
    for key in path.split("."):
        if not isinstance(value, Mapping) or value.get(key) is None:
            fail(f"config: {path}", "a value", "nothing")
        value = value[key]
    return value


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

    Floating-point tensors come out as float32. What needs no joining stays mapped from the file.
    """
    expected = {name: item.their_shape for item in links for name in item.theirs if name is not None}
    account({**expected, **(unused or {})}, tensors, where)
    return {item.ours: _joined(item, tensors) for item in links}


def give(links: Sequence[Link], ours: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The published tensors from ours (a state dict, or gradients); parts that stand for zeros are left out."""
    theirs: dict[str, Tensor] = {}
    for item in links:
        if item.ours not in ours:
            continue
        require(item.change is None, item.ours, "a tensor that was only joined or reshaped", "one that was recomputed")
        parts = ours[item.ours].chunk(len(item.theirs)) if len(item.theirs) > 1 else (ours[item.ours],)
        for name, part in zip(item.theirs, parts, strict=True):
            if name is not None:
                theirs[name] = part.reshape(item.their_shape)
    return theirs


def _stand_ins(file: Path) -> list[Any]:
    """Plain mappings under the names of unknown classes that a pickle asks for; none for names of Python, torch and
    numpy, which a configuration has no use for, so that a file that asks for those is refused."""
    if not zipfile.is_zipfile(file):
        return []
    names = torch.serialization.get_unsafe_globals_in_checkpoint(file)
    return [(OrderedDict, name) for name in names if name.partition(".")[0] not in _NO_CONFIGURATION]


def _joined(item: Link, tensors: Mapping[str, Tensor]) -> Tensor:
    zeros = torch.zeros(()).expand(item.their_shape)
    parts = [zeros if name is None else tensors[name] for name in item.theirs]
    tensor = torch.cat(parts) if len(parts) > 1 else parts[0]
    tensor = tensor.float() if tensor.is_floating_point() else tensor
    return tensor.reshape(item.shape) if item.change is None else item.change(tensor)


def _rename(name: str | None, pattern: str, replacement: str | tuple[str | None, ...]) -> tuple[str | None, ...]:
    if name is None or not re.search(pattern, name):
        return (name,)
    if isinstance(replacement, str):
        return (re.sub(pattern, replacement, name),)
    return tuple(None if part is None else re.sub(pattern, part, name) for part in replacement)


def _first_line(error: Exception) -> str:
    """The first sentence of torch's long messages."""
    return str(error).strip().splitlines()[0].split(". ")[0] if str(error).strip() else type(error).__name__
