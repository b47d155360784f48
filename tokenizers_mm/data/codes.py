"""Files of codes: what `tokenizers-mm encode` writes and `decode` reads, `.safetensors` or `.npz`.

Images of one size: `ids` int64 [B, L] or `latents` float [B, L, D]. Images of several sizes: the rows of all images one
after the other, `ids` [N] or `latents` [N, D]; `offsets` int64 [B + 1], where each image begins and the last one ends;
`sizes` int64 [B, 2], height and width; for latents `grids` int64 [B, 2], rows and columns. The texts beside the tensors
(in an `.npz` the array `metadata`, JSON) are `family`, `names` (a JSON list: the files), and for one size `height`,
`width` and for latents `rows` and `columns`.
"""

import json
import struct
import tokenize
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from tokenizers_mm._check import fail, require
from tokenizers_mm._files import atomic_path, file_place, kind_of
from tokenizers_mm._images import MAX_PIXELS
from tokenizers_mm.types import ImageCodes, ImageLatents, Stream, as_ids

ENDINGS = (".safetensors", ".npz")

BROKEN = (
    *(SafetensorError, zipfile.BadZipFile, zlib.error, struct.error, tokenize.TokenError, SyntaxError, MemoryError),
    *(OSError, EOFError, LookupError, TypeError, ValueError, ArithmeticError, RuntimeError, AttributeError),
)
"""Errors of safetensors, zipfile and numpy for files that are broken."""


@dataclass(frozen=True)
class CodesOfImage:
    """The rows of one image: ids int64 [L] or latents float [L, D]; grid is (rows, columns) of latents."""

    values: Tensor
    height: int
    width: int
    grid: tuple[int, int] | None

    def is_like(self, other: "CodesOfImage") -> bool:
        """Whether the codes of both can be one batch."""
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
    file_place(path)


def write_codes(
    path: Path, codes: Sequence[ImageCodes] | Sequence[ImageLatents], names: Sequence[str], family: str
) -> None:
    """Write the codes of single images, in order, each with a name."""
    check_output(path)
    first = codes[0]
    latents = isinstance(first, ImageLatents)
    rows = [(item.values if isinstance(item, ImageLatents) else item.ids)[0].cpu() for item in codes]
    facts = {"family": family, "names": json.dumps(list(names))}
    key = "latents" if latents else "ids"
    sizes = [(item.height, item.width) for item in codes]
    if len(set(sizes)) == 1:
        tensors = {key: torch.stack(rows)}
        facts |= {"height": str(first.height), "width": str(first.width)}
        if isinstance(first, ImageLatents):
            facts |= {"rows": str(first.grid[0]), "columns": str(first.grid[1])}
    else:
        lengths = torch.tensor([0, *(len(row) for row in rows)])
        tensors = {key: torch.cat(rows), "offsets": lengths.cumsum(0), "sizes": torch.tensor(sizes)}
        if latents:
            tensors["grids"] = torch.tensor([item.grid for item in codes if isinstance(item, ImageLatents)])
    with atomic_path(path) as temporary:
        if path.suffix == ".npz":
            arrays: dict[str, Any] = {}
            for name, tensor in tensors.items():
                arrays[name] = tensor.float().numpy() if tensor.is_floating_point() else tensor.numpy()
            with temporary.open("wb") as stream:
                np.savez(stream, metadata=np.array(json.dumps(facts)), **arrays)
        else:
            save_file(tensors, temporary, metadata=facts)


def read_codes(path: Path) -> Iterator[CodesOfImage]:
    """The codes of each image of a file, checked; ValueError names the file and what is wrong with it."""
    tensors, facts = _read(path)
    key = "ids" if "ids" in tensors else "latents"
    if key not in tensors:
        fail("ids", "a file that `encode` wrote", str(path))
    values = as_ids(tensors["ids"]) if key == "ids" else tensors[key]
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
        offsets, sizes = as_ids(tensors["offsets"]), as_ids(tensors["sizes"])
        wide = [sizes, as_ids(tensors["grids"])] if "grids" in tensors else [sizes]
        count = len(offsets) - 1 if offsets.ndim == 1 else -1
        right = count > 0 and all(tuple(t.shape) == (count, 2) for t in wide) and len(wide) == 1 + (key == "latents")
        ends = offsets.flatten().tolist()
        right = right and ends[0] == 0 and ends[-1] == len(values) and ends == sorted(ends)
        require(right, str(path), "offsets and sizes that fit each other", f"offsets {list(offsets.shape)}")
        places = torch.cat(wide, 1).tolist()
        parts = values.split(offsets.diff().tolist())
    for part, (height, width, *grid) in zip(parts, places, strict=True):
        require(0 < height * width <= MAX_PIXELS and height > 0, str(path), "sizes of images", f"{height} x {width}")
        yield CodesOfImage(part, height, width, (grid[0], grid[1]) if grid else None)


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
    with path.open("rb") as stream, np.load(stream, allow_pickle=False) as file:
        facts: Any = json.loads(str(file["metadata"])) if "metadata" in file else {}
        arrays = {name: file[name] for name in ("ids", "latents", "offsets", "sizes", "grids") if name in file}
    if not isinstance(facts, dict) or not all(isinstance(value, str) for value in facts.values()):
        raise ValueError("metadata is no mapping of texts")
    return {name: torch.from_numpy(array) for name, array in arrays.items()}, facts
