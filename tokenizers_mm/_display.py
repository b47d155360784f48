"""Forms of values for people: sheets of images, PNG bytes and HTML for notebooks.

A notebook calls `_repr_html_` or `_repr_png_` of a value; those methods are written with the functions below.
"""

import base64
import html
from collections.abc import Mapping, Sequence
from io import BytesIO
from typing import Any

import numpy as np
from PIL import Image
from torch import Tensor

from tokenizers_mm._images import tensor_to_images

MAX_SHOWN = 16
"""Images of a batch that a notebook shows."""

CELL = 8
"""Pixels of one id, per side, in a map of ids."""


def comparison_grid(originals: Tensor, reconstructions: Tensor, columns: int = 8, zoom: int = 1) -> Image.Image:
    """Rows of originals, each over the row of its reconstructions; images [B, 3, H, W] in [-1, 1]."""
    return sheet([tensor_to_images(originals), tensor_to_images(reconstructions)], columns, zoom)


def sheet(lines: Sequence[Sequence[Image.Image]], columns: int = 8, zoom: int = 1) -> Image.Image:
    """Images of one size on white: `lines` of equally many images, wrapped together after `columns`.

    zoom: pixels of the sheet per pixel of an image and side.
    """
    first = lines[0][0]
    width, height, gap = first.width * zoom, first.height * zoom, max(2, 2 * zoom)
    columns = min(columns, len(lines[0])) if len(lines) == 1 else columns
    rows, block = -(-len(lines[0]) // columns), len(lines) * height + 2 * gap
    made = Image.new("RGB", (columns * (width + gap) + gap, rows * block + gap), "white")
    for line, images in enumerate(lines):
        for index, image in enumerate(images):
            row, column = divmod(index, columns)
            large = image.resize((width, height), Image.Resampling.NEAREST)
            made.paste(large, (gap + column * (width + gap), gap + row * block + line * (height + 1)))
    return made


def png(image: Image.Image) -> bytes:
    """The bytes of a PNG file."""
    stream = BytesIO()
    image.save(stream, format="PNG")
    return stream.getvalue()


def image_tag(image: Image.Image) -> str:
    """An HTML element that holds an image."""
    return f'<img src="data:image/png;base64,{base64.b64encode(png(image)).decode()}">'


def table(title: str, facts: Mapping[str, Any], below: str = "") -> str:
    """HTML of a title over two columns of texts, which are escaped. below: HTML after the table."""
    rows = "".join(f"<tr><th>{html.escape(k)}</th><td>{html.escape(str(v))}</td></tr>" for k, v in facts.items())
    return f"<div><b>{html.escape(title)}</b><table>{rows}</table>{below}</div>"


def id_map(ids: Tensor, grid: tuple[int, int]) -> Image.Image:
    """Ids [rows * columns] of a grid as an image: one coloured square per id, equal ids in equal colours."""
    values = ids.detach().cpu().numpy().astype(np.uint64).reshape(grid)
    mixed = (values + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)  # Fibonacci hashing: near ids, far colours
    colours = np.stack([(mixed >> np.uint64(shift)).astype(np.uint8) for shift in (56, 40, 24)], -1)
    return Image.fromarray(colours.repeat(CELL, 0).repeat(CELL, 1))


def grids_text(grids: Sequence[tuple[int, int]]) -> str:
    """Grids as `1x1 2x2`."""
    return " ".join(f"{rows}x{columns}" for rows, columns in grids)
