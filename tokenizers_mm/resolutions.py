"""Sizes and grids of a two-stream tokenizer at any resolution, as plain integers.

One object answers for everybody: the tokenizer (what the semantic tower sees), the language-model layout (rows and
columns of each stream), constrained decoding (how many ids) and the data pipeline (which size a picture is brought to).
Sizes are always (height, width), in pixels. The numbers are those of ILLUME+ (arXiv 2504.01934).
"""

import math
from dataclasses import dataclass
from typing import Annotated

from tokenizers_mm._check import fail, require
from tokenizers_mm.config import Cells, Pixels, Range

Size = tuple[int, int]

_Size = tuple[Pixels, Pixels]

TOWER_SIZES: tuple[tuple[Size, Size], ...] = (
    ((256, 256), (252, 252)),
    ((512, 512), (504, 504)),
    ((512, 384), (448, 336)),
    ((768, 384), (728, 364)),
    ((1024, 256), (1008, 252)),
    ((576, 384), (504, 336)),
    ((960, 320), (924, 308)),
)
"""Image size -> size of the semantic tower's input, chosen to keep the aspect ratio; a transposed entry holds too."""

ANCHORS: tuple[Size, ...] = (
    (512, 512),
    (384, 512),
    (512, 384),
    (384, 768),
    (768, 384),
    (384, 576),
    (576, 384),
    (320, 960),
    (960, 320),
    (256, 1024),
    (1024, 256),
)
"""The sizes that generation and editing use."""


@dataclass(frozen=True)
class Cover:
    """An anchor, the size that covers it at the picture's aspect ratio, and the share of that size that is cut away."""

    anchor: Size
    covering: Size
    cropped: float


@dataclass(frozen=True)
class Resolutions:
    """The rules. The defaults are the published ones.

    pixel_cell, semantic_cell: pixels per id and side, of the image and of the semantic tower's input.
    tower_sizes: exceptions to the rule that the tower sees the image rounded down to its cell.
    anchors: the sizes for generation, as `nearest_anchor` compares them.
    min_pixels, max_pixels: bounds of the area in `smart_size`.
    """

    pixel_cell: Cells = 16
    semantic_cell: Cells = 28
    tower_sizes: tuple[tuple[_Size, _Size], ...] = TOWER_SIZES
    anchors: tuple[_Size, ...] = ANCHORS
    min_pixels: Annotated[int, Range(1, 1 << 28)] = 32**2
    max_pixels: Annotated[int, Range(1, 1 << 28)] = 1024**2

    def __post_init__(self) -> None:
        require(self.pixel_cell > 0 and self.semantic_cell > 0, "cells", "positive numbers", self)
        require(0 < self.min_pixels <= self.max_pixels, "min_pixels", f"1 to {self.max_pixels}", self.min_pixels)
        for image, tower in self.tower_sizes:
            require(
                all(side > 0 and side % self.semantic_cell == 0 for side in tower),
                f"tower_sizes of {image}",
                f"multiples of {self.semantic_cell}",
                tower,
            )

    def tower_size(self, height: int, width: int) -> Size:
        """Size at which the semantic tower sees an image: the table's size, else each side rounded down to the cell."""
        for (rows, columns), tower in self.tower_sizes:
            if (height, width) == (rows, columns):
                return tower
            if (height, width) == (columns, rows):
                return tower[1], tower[0]
        cell = self.semantic_cell
        return max(cell, height // cell * cell), max(cell, width // cell * cell)

    def semantic_grid(self, height: int, width: int) -> Size:
        """Rows and columns of semantic ids."""
        tower = self.tower_size(height, width)
        return tower[0] // self.semantic_cell, tower[1] // self.semantic_cell

    def pixel_grid(self, height: int, width: int) -> Size:
        """Rows and columns of pixel ids; ValueError where the sides are no multiples of `pixel_cell`."""
        cell = self.pixel_cell
        if height < cell or width < cell or height % cell or width % cell:
            fail("size", f"height and width that are multiples of {cell}", f"{height} x {width}")
        return height // cell, width // cell

    def counts(self, height: int, width: int) -> tuple[int, int]:
        """Numbers of semantic and of pixel ids."""
        return math.prod(self.semantic_grid(height, width)), math.prod(self.pixel_grid(height, width))

    def smart_size(self, height: int, width: int, min_pixels: int | None = None, max_pixels: int | None = None) -> Size:
        """The size to resize to: sides rounded to the pixel cell, the area brought into the bounds.

        Halves round to even. Very long pictures can leave the bounds again, since no side goes below one cell.
        """
        cell = self.pixel_cell
        low = self.min_pixels if min_pixels is None else min_pixels
        high = self.max_pixels if max_pixels is None else max_pixels
        require(height > 0 and width > 0, "size", "positive sides", f"{height} x {width}")
        rows, columns = round(height / cell), round(width / cell)
        if rows * columns * cell**2 > high:
            shrink = math.sqrt(height * width / high)
            rows, columns = math.floor(height / shrink / cell), math.floor(width / shrink / cell)
        elif rows * columns * cell**2 < low:
            grow = math.sqrt(low / (height * width))
            rows, columns = math.ceil(height * grow / cell), math.ceil(width * grow / cell)
        return max(rows, 1) * cell, max(columns, 1) * cell

    def nearest_anchor(self, height: int, width: int) -> int:
        """Index of the anchor of the nearest width / height; among equals the nearest in size."""
        require(height > 0 and width > 0, "size", "positive sides", f"{height} x {width}")

        def distance(index: int) -> tuple[float, int]:
            rows, columns = self.anchors[index]
            return abs(width / height - columns / rows), (height - rows) ** 2 + (width - columns) ** 2

        return min(range(len(self.anchors)), key=distance)

    def cover(self, height: int, width: int) -> Cover:
        """Fit of a picture to its nearest anchor by scaling and cutting; training leaves out `cropped` > 0.2."""
        rows, columns = anchor = self.anchors[self.nearest_anchor(height, width)]
        covering = covering_size((height, width), anchor)
        return Cover(anchor, covering, 1 - rows * columns / (covering[0] * covering[1]))


def covering_size(size: Size, target: Size) -> Size:
    """The smallest size of the aspect ratio of `size` that covers `target`, fractions cut off."""
    (height, width), (rows, columns) = size, target
    if width * rows >= columns * height:
        return rows, width * rows // height
    return height * columns // width, columns


def contained_size(size: Size, target: Size) -> Size:
    """The largest size of the aspect ratio of `size` that fits into `target`, fractions cut off, sides at least 1."""
    (height, width), (rows, columns) = size, target
    if width * rows >= columns * height:
        return max(1, height * columns // width), columns
    return rows, max(1, width * rows // height)
