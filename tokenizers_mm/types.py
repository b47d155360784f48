"""The nouns that travel between the parts: streams of ids, codes, latents and what a quantizer returns."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from tokenizers_mm._check import fail, require

if TYPE_CHECKING:
    from PIL.Image import Image


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


B = TypeVar("B", bound="_Batch")


class _Batch:
    """A batch of images of one size, held in one tensor: indexing, iteration and comparison."""

    height: int
    width: int

    def _tensor(self) -> Tensor:
        """The tensor whose first axis counts the images."""
        raise TypeError(f"{type(self).__name__} without a tensor")

    def _map(self: B, change: Callable[[Tensor], Tensor]) -> B:
        """The same batch with every tensor changed."""
        raise TypeError(f"{type(self).__name__} without a tensor")

    def __len__(self) -> int:
        return self._tensor().shape[0]

    def __getitem__(self: B, index: Any) -> B:
        """A batch of some of the images: one for a number, several for a slice, a list of numbers or a mask [B]."""
        tensor = self._tensor()
        if isinstance(index, (Tensor, np.ndarray)) and index.ndim == 0:
            index = index.item()
        if isinstance(index, (int, np.integer)) and not isinstance(index, bool):
            if not -len(tensor) <= index < len(tensor):
                raise IndexError(f"index: expected {-len(tensor)} to {len(tensor) - 1}, got {index}")
            index = [int(index)]
        elif not isinstance(index, (slice, list, Tensor, np.ndarray)):
            fail("index", "a number, a slice, a list of numbers or a mask", index)
        return self._map(lambda tensor: tensor[index])

    def __iter__(self: B) -> Iterator[B]:
        """Batches of one image each."""
        return (self[index] for index in range(len(self)))

    def unbind(self: B) -> list[B]:
        """The same images as batches of one."""
        return list(self)

    def to(self: B, device: torch.device | str) -> B:
        """The same batch on another device."""
        return self._map(lambda tensor: tensor.to(device))

    def numpy(self) -> np.ndarray:
        """The tensor as an array on the CPU; bfloat16, which numpy has not, as float32."""
        tensor = self._tensor().detach().cpu()
        return (tensor.float() if tensor.dtype == torch.bfloat16 else tensor).numpy()

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        array = self.numpy()
        return array if dtype is None else array.astype(dtype)

    def __eq__(self, other: object) -> bool:
        """Equal sizes and equal values, on whatever devices."""
        if type(self) is not type(other):
            return NotImplemented
        assert isinstance(other, _Batch)
        return self._place() == other._place() and torch.equal(self._tensor().cpu(), other._tensor().cpu())

    __hash__ = None  # type: ignore[assignment]

    def _place(self) -> tuple[Any, ...]:
        """All but the tensor."""
        return self.height, self.width


@dataclass(frozen=True, eq=False, repr=False)
class ImageCodes(_Batch):
    """The discrete form of a batch of images of one size.

    `ids` is int64 [B, L]: all streams one after the other, each coarse to fine, row-major. A whole number of scales of
    the last stream may be missing at the end (partial decoding). Integers of any kind are taken (other tensors, numpy
    arrays, lists of lists) and become int64. `height` and `width` are those of the images in pixels. `margins`, float32
    [B, L], are there after `encode(..., stable=True)`: by how much farther, not squared, the second code was (see
    `kernels.nearest_code`).

    `codes[i]` is the batch of image i alone, `codes[a:b]` one of several; iterating gives batches of one. `==` compares
    sizes, streams and ids. `codes.numpy()` are the ids as an array.

    Raises: ValueError for ids that are no integers, not [B, L] of whole scales, or not in the codebook of their stream.
    """

    ids: Tensor
    height: int
    width: int
    streams: tuple[Stream, ...]
    margins: Tensor | None = None

    def __post_init__(self) -> None:
        if not torch.compiler.is_compiling():  # values cannot be looked at inside a graph
            object.__setattr__(self, "ids", check_ids(self.ids, self.streams))

    def stream(self, name: str) -> Tensor:
        """The ids of one stream, int64 [B, n]; ValueError for a name that is none."""
        start = 0
        for stream in self.streams:
            if stream.name == name:
                return self.ids[:, start : start + stream.num_ids]
            start += stream.num_ids
        fail("stream", f"one of {[s.name for s in self.streams]}", repr(name))

    def _tensor(self) -> Tensor:
        return self.ids

    def _map(self, change: Callable[[Tensor], Tensor]) -> "ImageCodes":
        return replace(self, ids=change(self.ids), margins=None if self.margins is None else change(self.margins))

    def _place(self) -> tuple[Any, ...]:
        return self.height, self.width, self.streams

    def __repr__(self) -> str:
        streams = ", ".join(f"{s.name} {s.num_ids} ids of {s.codebook_size:,}" for s in self.streams)
        shape = "x".join(map(str, self.ids.shape))
        return f"ImageCodes({len(self)} of {self.height}x{self.width} pixels, ids {shape}: {streams})"

    def _repr_html_(self) -> str:
        from tokenizers_mm._display import MAX_SHOWN, grids_text, id_map, image_tag, table  # Pillow, in notebooks only

        facts = {
            "images": f"{len(self)} of {self.height} x {self.width} pixels",
            "ids": f"int64 {list(self.ids.shape)}",
        }
        for stream in self.streams:
            count = f"{stream.num_ids} ids, {stream.codebook_size:,} codes, grids {grids_text(stream.grids)}"
            facts[f"stream {stream.name}"] = count
        maps, start = "", 0
        for stream in self.streams:
            ends = [rows * columns for rows, columns in stream.grids]
            finest = max((i for i in range(len(ends)) if start + sum(ends[: i + 1]) <= self.ids.shape[1]), default=None)
            if finest is not None:
                low = start + sum(ends[:finest])
                rows = self.ids[:MAX_SHOWN, low : low + ends[finest]]
                maps += "<div>" + " ".join(image_tag(id_map(row, stream.grids[finest])) for row in rows) + "</div>"
            start += stream.num_ids
        return table("ImageCodes", facts, maps)


@dataclass(frozen=True, eq=False, repr=False)
class ImageLatents(_Batch):
    """The continuous form of a batch of images of one size: `values` is float [B, L, D], row-major over `grid`.

    `height` and `width` are those of the images in pixels, `grid` the rows and columns of the latents. It is indexed,
    iterated and compared as `ImageCodes` are.
    """

    values: Tensor
    height: int
    width: int
    grid: tuple[int, int]

    def _tensor(self) -> Tensor:
        return self.values

    def _map(self, change: Callable[[Tensor], Tensor]) -> "ImageLatents":
        return replace(self, values=change(self.values))

    def _place(self) -> tuple[Any, ...]:
        return self.height, self.width, self.grid

    def __repr__(self) -> str:
        shape, dtype = "x".join(map(str, self.values.shape)), str(self.values.dtype).removeprefix("torch.")
        grid = f"{self.grid[0]}x{self.grid[1]}"
        return f"ImageLatents({len(self)} of {self.height}x{self.width} pixels, {dtype} {shape}, grid {grid})"


Codes = TypeVar("Codes", ImageCodes, ImageLatents)
"""Result of a family's encoding: ids in grids, or continuous latents."""


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


@dataclass(frozen=True, repr=False)
class Reconstruction:
    """A forward pass of a tokenizer, all that the training terms need; a notebook shows its images.

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

    def to_pil(self) -> "list[Image]":
        """The images as PIL images, clamped; ValueError for a tokenizer without pixels."""
        from tokenizers_mm._images import tensor_to_images  # Pillow, where an image is looked at

        if self.image is None:
            fail("image", "a tokenizer with a pixel decoder", "None")
        return tensor_to_images(self.image)

    def __repr__(self) -> str:
        parts = {"image": self.image, "semantic": self.semantic, "target": self.target, "vectors": self.vectors}
        shapes = "".join(f"{name} {list(part.shape)}, " for name, part in parts.items() if part is not None)
        return f"Reconstruction({shapes}quantized {list(self.quantized)})"

    def _repr_png_(self) -> bytes | None:
        from tokenizers_mm._display import MAX_SHOWN, png, sheet

        return None if self.image is None else png(sheet([self.to_pil()[:MAX_SHOWN]]))


@dataclass(frozen=True)
class Disturbance:
    """Changes to a forward pass that make training harder than inference.

    keep: indices of the scales to use, None for all. perturb: maps the quantized pixel vectors [B, h, w, D] to those
    that the decoder gets, None for the identity.
    """

    keep: tuple[int, ...] | None = None
    perturb: Callable[[Tensor], Tensor] | None = None


UNDISTURBED = Disturbance()


def expect_codes(codes: Any, kind: type["ImageCodes | ImageLatents"]) -> None:
    """Refuse what is no `ImageCodes`, or no `ImageLatents`, where one of them is to be decoded."""
    hint = " (plain ids: decode_ids)" if kind is ImageCodes else ""
    require(isinstance(codes, kind), "codes", f"{kind.__name__}, as encode returns{hint}", codes)


def join_codes(parts: Sequence[Codes]) -> Codes:
    """Batches of codes of one size as one batch, in order."""
    first = parts[0]
    sizes = sorted({(part.height, part.width) for part in parts})
    require(len(sizes) == 1, "codes", "codes of one size", sizes)
    if isinstance(first, ImageCodes):
        margins = [part.margins for part in parts if part.margins is not None]  # pyright: ignore[reportAttributeAccessIssue]
        joined = torch.cat(margins) if len(margins) == len(parts) else None
        return replace(first, ids=torch.cat([part.ids for part in parts]), margins=joined)  # pyright: ignore[reportAttributeAccessIssue]
    return replace(first, values=torch.cat([part.values for part in parts]))  # pyright: ignore[reportAttributeAccessIssue]


def as_ids(ids: Any, expected: str = "integers", name: str = "ids") -> Tensor:
    """Integers of any kind (a tensor, a numpy array, nested lists) as an int64 tensor; floats and booleans refused.

    expected, name: for the error.
    """
    if isinstance(ids, Tensor):
        whole = not (ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool)
        require(whole, name, expected, ids)
        return ids.to(torch.int64)
    try:
        array = np.asarray(ids)
    except (ValueError, TypeError, OverflowError):  # rows of several lengths
        fail(name, expected, ids)
    require(array.dtype.kind in "iu" and bool((array < 2**63).all()), name, expected, array if array.ndim else ids)
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
