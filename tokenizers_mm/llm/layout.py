"""Form of an image as a row of tokens, as data: the order of the streams and the markers between them."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from tokenizers_mm._check import fail, require
from tokenizers_mm.llm.ids import as_ids
from tokenizers_mm.types import ImageCodes, Stream

IMAGE_START, IMAGE_END, ROW_END, SCALE_END, SIZE_END = "image_start", "image_end", "row_end", "scale_end", "size_end"


def stream_marker(stream: str, side: Literal["start", "end"]) -> str:
    """The name of the marker before or after a stream."""
    return f"{stream}_{side}"


def size_markers(height: int, width: int) -> tuple[str, str]:
    """The names of the two markers of an image size."""
    return f"height_{height}", f"width_{width}"


def fill_size_text(pattern: str, **numbers: int) -> str:
    """The text that says an image's size: each {name} of the pattern replaced by its number, and nothing else."""
    for name, number in numbers.items():
        pattern = pattern.replace(f"{{{name}}}", str(number))
    return pattern


@dataclass(frozen=True)
class Layout:
    """The markers of an image's sequence.

    streams: the order in which the streams are written. stream_markers: a marker before and after each. row_end and
    scale_end: a marker after each row and each grid. size: where the image size is said: "none" (one size only),
    "before" or "after" the start of the image with a height and a width marker, or as "text" after the start,
    `size_text` filled with height, width (pixels), rows and columns (of the first stream), closed by `size_end`; a
    text of more than 200 characters, or with other names in braces, is a ValueError.
    """

    streams: tuple[str, ...]
    stream_markers: bool = False
    row_end: bool = False
    scale_end: bool = False
    size: Literal["none", "before", "after", "text"] = "none"
    size_text: str = "{height} {width}"

    def __post_init__(self) -> None:
        left = fill_size_text(self.size_text, height=0, width=0, rows=0, columns=0)
        right = "{" not in left and "}" not in left and len(left) <= 200
        require(right, "layout.size_text", "a text with {height}, {width}, {rows} or {columns}", self.size_text)

    def marker_names(self, sizes: Sequence[tuple[int, int]]) -> list[str]:
        """The markers this layout needs for images of these (height, width), in the order new ids are given."""
        names = [IMAGE_START, IMAGE_END]
        names += [ROW_END] if self.row_end else []
        names += [SCALE_END] if self.scale_end else []
        names += [SIZE_END] if self.size == "text" else []
        if self.stream_markers:
            names += [stream_marker(stream, side) for stream in self.streams for side in ("start", "end")]
        if self.size in ("before", "after"):
            names += [f"height_{height}" for height in sorted({height for height, _ in sizes})]
            names += [f"width_{width}" for width in sorted({width for _, width in sizes})]
        return names


@dataclass(frozen=True)
class ImagePlan:
    """The sequence of an image of one size: each slot takes one id, or any id of one codebook.

    low, high: int64 [n], the ids [low, high) that each slot takes. header: the first slots, which say that an image of
    this size begins; short: those of them that remain where the size is known already. code_slots: int64 [L], the slot
    of each id of `ImageCodes.ids`. places: int64 [n, 4], the (stream, scale, row, column) of a code, else -1.
    """

    height: int
    width: int
    streams: tuple[Stream, ...]
    header: tuple[int, ...]
    short: tuple[int, ...]
    low: Tensor
    high: Tensor
    code_slots: Tensor
    places: Tensor

    @property
    def length(self) -> int:
        """Tokens of one image, header included."""
        return self.low.shape[0]

    def to_tokens(self, ids: Tensor) -> Tensor:
        """Codes [B, L] as tokens [B, n]."""
        ids = as_ids(ids, "ids")
        require(
            ids.ndim == 2 and ids.shape[1] == self.code_slots.shape[0],
            "ids",
            f"int64 [B, {self.code_slots.shape[0]}]",
            ids,
        )
        tokens = self.low.to(ids.device).repeat(ids.shape[0], 1)
        tokens[:, self.code_slots.to(ids.device)] += ids
        return tokens

    def to_codes(self, tokens: Tensor) -> ImageCodes:
        """Tokens [B, n] as codes; ValueError names the first token that has no place where it stands."""
        tokens = as_ids(tokens, "tokens")
        require(tokens.ndim == 2 and tokens.shape[1] == self.length, "tokens", f"int64 [B, {self.length}]", tokens)
        low, high = self.low.to(tokens.device), self.high.to(tokens.device)
        wrong = ((tokens < low) | (tokens >= high)).nonzero()
        if len(wrong):
            row, slot = (int(v) for v in wrong[0])
            fail(self.slot_name(slot), self.slot_range(slot), int(tokens[row, slot]))
        slots = self.code_slots.to(tokens.device)
        return ImageCodes(tokens[:, slots] - low[slots], self.height, self.width, self.streams)

    def slot_name(self, slot: int) -> str:
        """Name of a slot in errors."""
        return f"token {slot + 1} of {self.length} of a {self.height} x {self.width} image"

    def slot_range(self, slot: int) -> str:
        """Ids that an error expects in a slot, in words."""
        low, high = int(self.low[slot]), int(self.high[slot])
        return f"id {low}" if high == low + 1 else f"an id from {low} to {high - 1}"


def plan_image(
    layout: Layout,
    size: tuple[int, int],
    streams: tuple[Stream, ...],
    marker: Callable[[str], tuple[int, ...]],
    starts: dict[str, int],
    size_text: tuple[int, ...] = (),
) -> ImagePlan:
    """Write the plan of one image size.

    marker: the ids of a marker by name. starts: the first id of each stream's codes. size_text: the ids of the size as
    text, where the layout has it so.
    """
    begin, sizes = marker(IMAGE_START), size_markers(*size)
    said = marker(sizes[0]) + marker(sizes[1]) if layout.size in ("before", "after") else ()
    header = {
        "none": begin,
        "before": said + begin,
        "after": begin + said,
        "text": begin + size_text + (marker(SIZE_END) if layout.size == "text" else ()),
    }[layout.size]
    short = begin if layout.size == "before" else header
    order = {stream.name: index for index, stream in enumerate(streams)}
    low, high, places = [_fixed(header)[0]], [_fixed(header)[1]], [_fixed(header)[2]]

    def write(ids: tuple[int, ...]) -> None:
        for part, value in zip((low, high, places), _fixed(ids), strict=True):
            part.append(value)

    for name in layout.streams:
        index = order[name]
        if layout.stream_markers:
            write(marker(stream_marker(name, "start")))
        for scale, grid in enumerate(streams[index].grids):
            block = _grid(grid, starts[name], streams[index].codebook_size, marker(ROW_END) if layout.row_end else ())
            block[2][block[2][:, 0] >= 0, :2] = (index, scale)
            for part, value in zip((low, high, places), block, strict=True):
                part.append(value)
            if layout.scale_end:
                write(marker(SCALE_END))
        if layout.stream_markers:
            write(marker(stream_marker(name, "end")))
    write(marker(IMAGE_END))
    where = np.concatenate(places)
    slots = [np.flatnonzero(where[:, 0] == index) for index in range(len(streams))]
    return ImagePlan(
        *size,
        streams,
        header,
        short,
        torch.from_numpy(np.concatenate(low)),
        torch.from_numpy(np.concatenate(high)),
        torch.from_numpy(np.concatenate(slots) if slots else np.zeros(0, np.int64)),
        torch.from_numpy(where),
    )


def _fixed(ids: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Slots that take one id each."""
    low = np.array(ids, dtype=np.int64)
    return low, low + 1, np.full((len(ids), 4), -1, dtype=np.int64)


def _grid(
    grid: tuple[int, int], start: int, codebook_size: int, row_end: tuple[int, ...]
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The slots of one grid, with the row markers."""
    rows, columns = grid
    width = columns + len(row_end)
    low = np.full((rows, width), start, dtype=np.int64)
    high = low + codebook_size
    low[:, columns:], high[:, columns:] = row_end, np.array(row_end, dtype=np.int64) + 1
    places = np.full((rows, width, 4), -1, dtype=np.int64)
    places[:, :columns, :2] = 0
    places[:, :columns, 2], places[:, :columns, 3] = np.arange(rows)[:, None], np.arange(columns)
    return low.reshape(-1), high.reshape(-1), places.reshape(-1, 4)
