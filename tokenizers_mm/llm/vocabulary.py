"""The ids a language model gets for images: one range per stream of codes, and markers. Arithmetic only.

Saved as `visual_vocab.json` beside the text tokenizer. It holds all that is needed to write and read images as tokens,
so a server needs neither the image tokenizer nor this library to constrain what a model says.
"""

import itertools
import os
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tokenizers_mm._check import fail, require
from tokenizers_mm._files import settle, write_json
from tokenizers_mm._origin import KEY as ORIGIN
from tokenizers_mm._origin import OriginCheck, read_origin
from tokenizers_mm.config import from_mapping, read_json, to_mapping
from tokenizers_mm.llm.ids import as_ids
from tokenizers_mm.llm.layout import ImagePlan, Layout, fill_size_text, plan_image
from tokenizers_mm.models.base import ImageTokenizer
from tokenizers_mm.types import ImageCodes, Stream

FILE = "visual_vocab.json"
FORMAT = 1
MAX_SIDE, SIDE_STEP = 1024, 64
"""The sizes that are listed for a tokenizer of any size, unless others are asked for: multiples of the step."""

MAX_ROWS, MAX_SIZE, MAX_TEXT = 1 << 26, 1 << 16, 200
"""Limits of a vocabulary, which may come from a file of somebody else: ids, pixels of a side, length of a text."""

MAX_IDS, MAX_ALL_IDS = 1 << 20, 1 << 24
"""Limits of the codes of an image, and of one image of each size."""


@dataclass(frozen=True)
class Marker:
    """One marker: its name in the layout, its ids (several where it is a piece of text) and its text, if it has one."""

    name: str
    ids: tuple[int, ...]
    text: str = ""

    def __post_init__(self) -> None:
        require(0 < len(self.ids) <= MAX_TEXT, f"markers: ids of {self.name}", f"1 to {MAX_TEXT} ids", len(self.ids))
        inside = all(0 <= token < MAX_ROWS for token in self.ids)
        require(inside, f"markers: ids of {self.name}", f"ids from 0 to {MAX_ROWS - 1}", self.ids)


@dataclass(frozen=True)
class CodeRange:
    """The ids [start, start + size) of one stream; `text` with {} for the code, where the tokens have strings."""

    stream: str
    size: int
    start: int
    text: str = ""

    def __post_init__(self) -> None:
        right = not self.text or ("{}" in self.text and len(self.text) <= MAX_TEXT)
        require(right, "codes.text", f"a text of at most {MAX_TEXT} characters with {{}} for the code", self.text)
        require(0 < self.size <= MAX_ROWS, "codes.size", f"1 to {MAX_ROWS}", self.size)
        require(0 <= self.start <= MAX_ROWS, "codes.start", f"0 to {MAX_ROWS}", self.start)

    def text_of(self, code: int) -> str:
        """The text of one code's token."""
        return self.text.replace("{}", str(code))


@dataclass(frozen=True)
class ImageSize:
    """An image size in pixels, the grids of each stream, and the ids of the size as text where the layout has it."""

    height: int
    width: int
    grids: tuple[tuple[tuple[int, int], ...], ...]
    text_ids: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        sides = min(self.height, self.width) > 0 and max(self.height, self.width) <= MAX_SIZE
        require(sides, "sizes", f"heights and widths from 1 to {MAX_SIZE}", (self.height, self.width))
        name = f"sizes: grids of {self.height} x {self.width}"
        filled = all(grids and all(min(grid) > 0 for grid in grids) for grids in self.grids)
        require(filled, name, "at least one grid for each stream, of at least one row and column", self.grids)
        require(self.num_ids <= MAX_IDS, name, f"at most {MAX_IDS} ids in all", self.num_ids)
        spelled = len(self.text_ids) <= MAX_TEXT and all(0 <= token < MAX_ROWS for token in self.text_ids)
        require(spelled, "sizes.text_ids", f"at most {MAX_TEXT} ids from 0 to {MAX_ROWS - 1}", self.text_ids)

    @property
    def num_ids(self) -> int:
        """Codes of an image, of all streams."""
        return sum(rows * columns for grids in self.grids for rows, columns in grids)


@dataclass(frozen=True)
class VisualVocabulary:
    """Ids for markers and codes, the layout of an image, and the image sizes it knows.

    text_size: how many ids the text tokenizer had. codes: one range per stream, in the image tokenizer's order.
    tokenizer: the image tokenizer whose codes these are, of a saved processor (see `_origin`); "" where unknown.

    Raises: ValueError for ranges that overlap, a layout with other streams or without its markers, and sizes that do
    not fit the codes; ids are below 2^26.
    """

    text_size: int
    codes: tuple[CodeRange, ...]
    markers: tuple[Marker, ...]
    layout: Layout
    sizes: tuple[ImageSize, ...]
    tokenizer: str = ""
    _plans: dict[tuple[int, int], ImagePlan] = field(default_factory=dict, init=False, compare=False, repr=False)

    def __post_init__(self) -> None:
        require(0 <= self.text_size <= MAX_ROWS, "text_size", f"0 to {MAX_ROWS}", self.text_size)
        names = [code.stream for code in self.codes]
        require(len(set(names)) == len(names), "codes", "streams with names of their own", names)
        require(sorted(self.layout.streams) == sorted(names), "layout.streams", f"{names}, in any order", self.layout)
        taken = sorted((code.start, code.start + code.size, code.stream) for code in self.codes)
        taken += [(m.ids[0], m.ids[0] + 1, m.name) for m in self.markers if len(m.ids) == 1]
        taken.sort()
        for (_, end, first), (start, _, second) in itertools.pairwise(taken):
            require(end <= start, "ids", "markers and codes with ids of their own", f"{first} and {second} overlap")
        for size in self.sizes:
            require(len(size.grids) == len(self.codes), "sizes", f"grids of {len(self.codes)} streams", size)
        sizes = [(size.height, size.width) for size in self.sizes]
        require(len(set(sizes)) == len(sizes), "sizes", "each size once", f"{len(sizes) - len(set(sizes))} again")
        require(len(sizes) > 0 or not self.codes, "sizes", "at least one image size", "none")
        total = sum(size.num_ids for size in self.sizes)
        require(total <= MAX_ALL_IDS, "sizes", f"at most {MAX_ALL_IDS} ids of all sizes together", total)
        known = [marker.name for marker in self.markers]
        require(len(set(known)) == len(known), "markers", "each name once", f"{len(known) - len(set(known))} again")
        missing = sorted(set(self.layout.marker_names(sizes)) - set(known)) if self.codes else []
        require(not missing, "markers", "all that the layout needs", f"no {missing[:3]}")

    @classmethod
    def for_tokenizer(
        cls,
        tokenizer: ImageTokenizer,
        text_tokenizer: Any,
        layout: Layout | None = None,
        sizes: Sequence[tuple[int, int]] | None = None,
    ) -> "VisualVocabulary":
        """Ids behind those of the text tokenizer: the markers first, then the streams. Changes neither tokenizer.

        layout: by default start, codes, end; with stream markers where there are several streams, and with the size
        after the start where there are several sizes. sizes: (height, width) in pixels; by default the tokenizer's
        one size, or all multiples of 64 up to 1024 that it takes.
        """
        first = text_ids(text_tokenizer)
        known = image_sizes(tokenizer, sizes)
        streams = tokenizer.streams(known[0].height, known[0].width) if known else ()
        layout = layout or Layout(
            tuple(stream.name for stream in streams),
            stream_markers=len(streams) > 1,
            size="after" if len(known) > 1 else "none",
        )
        markers, next_id = [], first
        for name in layout.marker_names([(size.height, size.width) for size in known]):
            markers.append(Marker(name, (next_id,), f"<|{name}|>"))
            next_id += 1
        codes = []
        for stream in streams:
            codes.append(CodeRange(stream.name, stream.codebook_size, next_id))
            next_id += stream.codebook_size
        if layout.size == "text":
            known = spell_sizes(known, layout.size_text, text_tokenizer)
        return cls(first, tuple(codes), tuple(markers), layout, known)

    @property
    def size(self) -> int:
        """Rows an embedding needs: one more than the largest id."""
        ends = [code.start + code.size for code in self.codes] + [max(m.ids) + 1 for m in self.markers if m.ids]
        return max([self.text_size, *ends])

    def marker(self, name: str) -> tuple[int, ...]:
        """The ids of a marker; ValueError for a name that is none."""
        for marker in self.markers:
            if marker.name == name:
                return marker.ids
        fail("marker", f"one of {[marker.name for marker in self.markers][:8]}", repr(name))

    def streams(self, height: int, width: int) -> tuple[Stream, ...]:
        """The streams of an image of one of the known sizes (pixels), in the image tokenizer's order.

        Raises: ValueError, with the nearest known sizes, for another size.
        """
        size = self._size(height, width)
        return tuple(Stream(code.stream, code.size, grids) for code, grids in zip(self.codes, size.grids, strict=True))

    def plan(self, height: int, width: int) -> ImagePlan:
        """The sequence of an image of one of the known sizes."""
        key = (height, width)
        if key not in self._plans:
            starts = {code.stream: code.start for code in self.codes}
            text = self._size(height, width).text_ids
            self._plans[key] = plan_image(self.layout, key, self.streams(*key), self.marker, starts, text)
        return self._plans[key]

    def with_sizes(self, sizes: Sequence[tuple[int, int]]) -> "VisualVocabulary":
        """The same ids, for only these (height, width)."""
        return replace(self, sizes=tuple(self._size(*size) for size in sizes))

    def to_tokens(self, codes: ImageCodes) -> Tensor:
        """Codes of images of one size as tokens, int64 [B, n], markers included.

        Raises: ValueError for a size or streams that the vocabulary does not know.
        """
        plan = self.plan(codes.height, codes.width)
        require(codes.streams == plan.streams, "codes", f"streams {plan.streams}", codes.streams)
        return plan.to_tokens(codes.ids)

    def to_codes(self, tokens: Tensor, height: int, width: int) -> ImageCodes:
        """Codes of tokens int64 [B, L], the inverse of `to_tokens`; ValueError for what is not such an image."""
        return self.plan(height, width).to_codes(tokens)

    def token(self, stream: str, ids: Tensor) -> Tensor:
        """Codes of one stream as tokens, int64 of any shape; ValueError for an unknown stream or code."""
        ids = as_ids(ids, "ids")
        code = next((code for code in self.codes if code.stream == stream), None)
        if code is None:
            fail("stream", f"one of {[c.stream for c in self.codes]}", repr(stream))
        outside = ids.numel() > 0 and (int(ids.min()) < 0 or int(ids.max()) >= code.size)
        require(not outside, "ids", f"values from 0 to {code.size - 1}", "others")
        return ids + code.start

    def code(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """The inverse of `token`: (stream index, code), int64 of any shape; -1 for what is no code."""
        tokens = as_ids(tokens, "tokens")
        stream, ids = torch.full_like(tokens, -1), torch.full_like(tokens, -1)
        for index, code in enumerate(self.codes):
            inside = (tokens >= code.start) & (tokens < code.start + code.size)
            stream = stream.masked_fill(inside, index)
            ids = torch.where(inside, tokens - code.start, ids)
        return stream, ids

    def is_visual(self, tokens: Tensor) -> Tensor:
        """True for each token that is a code or a marker with an id of its own; bool of the same shape."""
        tokens = as_ids(tokens, "tokens")
        own = [marker.ids[0] for marker in self.markers if len(marker.ids) == 1]
        markers = torch.tensor(own, dtype=torch.int64, device=tokens.device)
        return (self.code(tokens)[0] >= 0) | torch.isin(tokens, markers)

    def check_text_tokenizer(self, text_tokenizer: Any) -> None:
        """Refuse a text tokenizer with other tokens than this vocabulary's in the place of markers and codes."""
        have = text_ids(text_tokenizer)
        right = self.text_size <= have <= self.size
        require(right, "text_tokenizer", f"the one of the vocabulary, with {self.text_size} tokens", f"{have} tokens")
        if have == self.text_size:
            return
        own = {marker.ids[0]: marker.text for marker in self.markers if len(marker.ids) == 1}
        for token, index in text_tokenizer.get_vocab().items():
            if index >= self.text_size and own.get(index) != token:
                code = next((code for code in self.codes if code.start <= index < code.start + code.size), None)
                text = own.get(index, "") if code is None else code.text and code.text_of(index - code.start)
                require(text == token, "text_tokenizer", f"{text!r} at id {index}", token)

    def add_to(self, text_tokenizer: Any) -> int:
        """Give the markers and codes that have texts their place in a text tokenizer; returns how many were added.

        For vocabularies whose tokens are strings, and to let plain text tokenizers print markers. Raises ValueError
        where the ids would not come out as they are here.
        """
        new = [(m.ids[0], m.text) for m in self.markers if m.text and len(m.ids) == 1 and m.ids[0] >= self.text_size]
        for code in self.codes:
            new += [(code.start + i, code.text_of(i)) for i in range(code.size)] if code.text else []
        new.sort()
        require(
            [index for index, _ in new] == list(range(self.text_size, self.text_size + len(new))),
            "vocabulary",
            f"tokens with texts from id {self.text_size} on, without gaps",
            "others",
        )
        have = text_ids(text_tokenizer)
        require(have == self.text_size, "text_tokenizer", f"{self.text_size} tokens", f"{have}")
        added = text_tokenizer.add_tokens([text for _, text in new])
        require(
            added == len(new), "text_tokenizer", f"none of the {len(new)} new tokens", f"{len(new) - added} of them"
        )
        return added

    def save(self, directory: str | os.PathLike[str]) -> None:
        """Write visual_vocab.json into a directory, atomically."""
        write_json(Path(directory) / FILE, {"library": "tokenizers_mm", "format": FORMAT, **to_mapping(self)})

    @classmethod
    def load(cls, directory: str | os.PathLike[str]) -> "VisualVocabulary":
        """Read visual_vocab.json of a directory; ValueError where there is none of this format."""
        settle(directory)
        path = Path(directory) / FILE
        require(path.is_file(), "directory", f"a directory with {FILE}", str(directory))
        data = read_json(path)
        require(data.pop("format", None) == FORMAT, str(path), f"format {FORMAT}", "another one")
        data.pop("library", None)
        found = from_mapping(cls, data, str(path))
        return replace(found, tokenizer=read_origin({ORIGIN: found.tokenizer}))

    @classmethod
    def load_for(
        cls, tokenizer: ImageTokenizer, directory: str | os.PathLike[str], any_tokenizer: bool = False
    ) -> "VisualVocabulary":
        """`load`, for an image tokenizer; one that was saved with another one is refused, unless `any_tokenizer`."""
        found = cls.load(directory)
        OriginCheck(tokenizer, any_tokenizer)(str(Path(directory) / FILE), found.tokenizer)
        return found

    def _size(self, height: int, width: int) -> ImageSize:
        for size in self.sizes:
            if (size.height, size.width) == (height, width):
                return size
        near = sorted(self.sizes, key=lambda s: abs(s.height - height) + abs(s.width - width))[:3]
        names = ", ".join(f"{s.height} x {s.width}" for s in near)
        fail("image size", f"one of the {len(self.sizes)} this vocabulary knows (near: {names})", f"{height} x {width}")


def text_ids(text_tokenizer: Any) -> int:
    """One more than the largest id of a text tokenizer."""
    return max(len(text_tokenizer), max(text_tokenizer.get_vocab().values(), default=-1) + 1)


def image_sizes(tokenizer: ImageTokenizer, sizes: Sequence[tuple[int, int]] | None = None) -> tuple[ImageSize, ...]:
    """Image sizes with their grids; without `sizes` those that the tokenizer takes (see `for_tokenizer`)."""
    if sizes is None and tokenizer.image_size is not None:
        sizes = [tokenizer.image_size]
    if sizes is not None:
        return tuple(_image_size(tokenizer, *size) for size in sizes)
    step = -(-SIDE_STEP // tokenizer.size_multiple) * tokenizer.size_multiple
    sides = range(step, MAX_SIDE + 1, step)
    found = []
    for height in sides:
        for width in sides:
            try:
                found.append(_image_size(tokenizer, height, width))
            except ValueError:
                continue
    require(len(found) > 0, "tokenizer", f"one that takes a multiple of {step} up to {MAX_SIDE}", "one that takes none")
    return tuple(found)


def spell_sizes(sizes: tuple[ImageSize, ...], pattern: str, text_tokenizer: Any) -> tuple[ImageSize, ...]:
    """The same sizes, each with the ids of its text."""
    spelled = []
    for size in sizes:
        rows, columns = size.grids[0][-1]
        text = fill_size_text(pattern, height=size.height, width=size.width, rows=rows, columns=columns)
        ids = text_tokenizer(text, add_special_tokens=False)["input_ids"]
        spelled.append(replace(size, text_ids=tuple(ids)))
    return tuple(spelled)


def _image_size(tokenizer: ImageTokenizer, height: int, width: int) -> ImageSize:
    return ImageSize(height, width, tuple(stream.grids for stream in tokenizer.streams(height, width)))
