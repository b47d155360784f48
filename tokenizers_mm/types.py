"""The nouns that travel between the parts: streams of ids, codes, latents and what a quantizer returns."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from tokenizers_mm._check import fail, require


@dataclass(frozen=True)
class Stream:
    """One list of grids of ids that come from one codebook.

    `grids` are (rows, columns), coarse to fine; a single-scale stream has one grid. Ids inside a grid are row-major.
    """

    name: str
    codebook_size: int
    grids: tuple[tuple[int, int], ...]

    @property
    def num_ids(self) -> int:
        """Ids of this stream in one image."""
        return sum(rows * columns for rows, columns in self.grids)


@dataclass(frozen=True)
class ImageCodes:
    """The discrete form of a batch of images of one size.

    `ids` is int64 [B, L]: all streams one after the other, each coarse to fine, row-major. A whole number of scales of
    the last stream may be missing at the end (partial decoding). Integers of any kind are taken (other tensors, numpy
    arrays, lists of lists) and become int64.
    """

    ids: Tensor
    height: int
    width: int
    streams: tuple[Stream, ...]

    def __post_init__(self) -> None:
        if not torch.compiler.is_compiling():  # values cannot be looked at inside a graph
            object.__setattr__(self, "ids", check_ids(self.ids, self.streams))

    def stream(self, name: str) -> Tensor:
        """The ids of one stream, int64 [B, n]."""
        start = 0
        for stream in self.streams:
            if stream.name == name:
                return self.ids[:, start : start + stream.num_ids]
            start += stream.num_ids
        fail("stream", f"one of {[s.name for s in self.streams]}", repr(name))

    def to(self, device: torch.device | str) -> "ImageCodes":
        """The same codes with the ids on another device."""
        return ImageCodes(self.ids.to(device), self.height, self.width, self.streams)

    def unbind(self) -> list["ImageCodes"]:
        """The same codes as batches of one image each."""
        return [ImageCodes(ids[None], self.height, self.width, self.streams) for ids in self.ids]

    def __len__(self) -> int:
        return self.ids.shape[0]


@dataclass(frozen=True)
class ImageLatents:
    """The continuous form of a batch of images of one size: `values` is float [B, L, D], row-major over `grid`."""

    values: Tensor
    height: int
    width: int
    grid: tuple[int, int]

    def to(self, device: torch.device | str) -> "ImageLatents":
        """The same latents on another device."""
        return ImageLatents(self.values.to(device), self.height, self.width, self.grid)

    def unbind(self) -> list["ImageLatents"]:
        """The same latents as batches of one image each."""
        return [ImageLatents(values[None], self.height, self.width, self.grid) for values in self.values]

    def __len__(self) -> int:
        return self.values.shape[0]


Codes = TypeVar("Codes", ImageCodes, ImageLatents)
"""What a family encodes to: ids in grids, or continuous latents."""


@dataclass(frozen=True)
class Quantized:
    """Result of a quantizer.

    vectors: [..., D], straight-through. ids: int64 [...], or [..., groups] with several ids per vector. terms:
    unweighted scalars by name, in training mode; the training configuration gives each a weight. queries: [..., D], the
    vectors that were searched for, detached, in the order of the ids (for the revival of codes).
    """

    vectors: Tensor
    ids: Tensor
    terms: Mapping[str, Tensor] | None = None
    queries: Tensor | None = None


@dataclass(frozen=True)
class Reconstruction:
    """A forward pass of a tokenizer, all that the training terms need.

    `image` [B, 3, H, W], None for a model without pixels; `semantic` [B, T, C], the prediction of the semantic decoder,
    None for a model without one; `target` [B, T, C], its target, None for a model without a frozen tower; `quantized`
    by stream; `vectors` [B, h, w, D], all of them on the decoder's grid: the value of `ImageTokenizer.vectors`, with
    the gradient of the features that were quantized.
    """

    image: Tensor | None
    semantic: Tensor | None
    target: Tensor | None
    quantized: Mapping[str, Quantized]
    vectors: Tensor


@dataclass(frozen=True)
class Disturbance:
    """Changes to a forward pass that make training harder than inference.

    keep: indices of the scales to use, None for all. perturb: maps the quantized pixel vectors [B, h, w, D] to those
    that the decoder gets, None for the identity.
    """

    keep: tuple[int, ...] | None = None
    perturb: Callable[[Tensor], Tensor] | None = None


UNDISTURBED = Disturbance()


def join_codes(parts: Sequence[Codes]) -> Codes:
    """Batches of codes of one size as one batch, in order."""
    first = parts[0]
    sizes = sorted({(part.height, part.width) for part in parts})
    require(len(sizes) == 1, "codes", "codes of one size", sizes)
    if isinstance(first, ImageCodes):
        return replace(first, ids=torch.cat([part.ids for part in parts]))  # pyright: ignore[reportAttributeAccessIssue]
    return replace(first, values=torch.cat([part.values for part in parts]))  # pyright: ignore[reportAttributeAccessIssue]


def as_ids(ids: Any, expected: str = "integers") -> Tensor:
    """Integers of any kind (a tensor, a numpy array, nested lists) as an int64 tensor; floats and booleans refused."""
    if isinstance(ids, Tensor):
        whole = not (ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool)
        require(whole, "ids", expected, ids)
        return ids.to(torch.int64)
    try:
        array = np.asarray(ids)
    except (ValueError, TypeError, OverflowError):  # rows of several lengths
        fail("ids", expected, ids)
    require(array.dtype.kind in "iu" and bool((array < 2**63).all()), "ids", expected, array if array.ndim else ids)
    return torch.from_numpy(array.astype(np.int64))


def check_ids(ids: Any, streams: Sequence[Stream]) -> Tensor:
    """Ids of any kind as int64 [B, L]; refused where they are not of whole scales, or not in the codebook."""
    total = sum(stream.num_ids for stream in streams)
    allowed = _partial_lengths(streams)
    others = "" if len(allowed) == 1 else f" (or whole scales only: {sorted(allowed)})"
    expected = f"int64 [B, {total}]{others}"
    ids = as_ids(ids, expected)
    require(ids.ndim == 2 and ids.shape[1] in allowed, "ids", expected, ids)
    start = 0
    for stream in streams:
        part = ids[:, start : start + stream.num_ids]
        start += stream.num_ids
        if part.numel() == 0:
            continue
        low, high = int(part.min()), int(part.max())
        require(
            low >= 0 and high < stream.codebook_size,
            f"ids of stream {stream.name!r}",
            f"values from 0 to {stream.codebook_size - 1}",
            f"values from {low} to {high}",
        )
    return ids


def _partial_lengths(streams: Sequence[Stream]) -> set[int]:
    """Lengths that end after a whole scale of the last stream."""
    length = sum(stream.num_ids for stream in streams[:-1])
    lengths = set()
    for rows, columns in streams[-1].grids if streams else ():
        length += rows * columns
        lengths.add(length)
    return lengths
