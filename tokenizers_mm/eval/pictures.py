"""Pictures to look at: originals over reconstructions, pictures over their captions, and training curves."""

import os
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from PIL import Image, ImageDraw

from tokenizers_mm._display import comparison_grid as comparison_grid
from tokenizers_mm._files import atomic_path


def save_picture(image: Image.Image, path: str | os.PathLike[str]) -> None:
    """Write a PNG, or a JPEG of quality 95 where the name ends in .jpg, atomically."""
    options: dict[str, Any] = {"format": "JPEG", "quality": 95} if str(path).endswith(".jpg") else {"format": "PNG"}
    with atomic_path(path) as temporary:
        image.save(temporary, **options)


def write_pictures(
    path: str | os.PathLike[str], items: Sequence[tuple[Image.Image, str]], columns: int = 4, zoom: int = 3
) -> None:
    """Write a PNG of pictures in a grid, each over its caption (four lines of it), atomically.

    items: at least one (picture, caption); the pictures are of one size and are shown `zoom` times as large.
    """
    side = items[0][0].width * zoom
    line, lines = 12, 5
    rows = -(-len(items) // columns)
    sheet = Image.new("RGB", (columns * (side + 8), rows * (side + line * lines)), "white")
    pen = ImageDraw.Draw(sheet)
    for index, (picture, caption) in enumerate(items):
        x, y = index % columns * (side + 8), index // columns * (side + line * lines)
        sheet.paste(picture.resize((side, side), Image.Resampling.NEAREST), (x, y))
        for number, text in enumerate(_wrap(caption, side // 6)[: lines - 1]):
            pen.text((x, y + side + number * line), text, fill="black")
    save_picture(sheet, path)


def plot_curves(curves: Mapping[str, Sequence[tuple[float, float]]], path: str | os.PathLike[str]) -> None:
    """One small panel per named curve of (step, value); drawn with matplotlib, written atomically."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # an extra: loaded when a plot is drawn
    from matplotlib.figure import Figure

    columns = 3
    rows = -(-len(curves) // columns)
    figure = Figure(figsize=(4 * columns, 2.6 * rows), layout="constrained")
    FigureCanvasAgg(figure)
    for index, (name, points) in enumerate(curves.items()):
        axes = figure.add_subplot(rows, columns, index + 1)
        steps, values = zip(*points, strict=True) if points else ((), ())
        axes.plot(steps, values, linewidth=1, color="tab:blue")
        axes.plot(steps, _smooth(values), linewidth=2, color="tab:orange")
        axes.set_title(name, fontsize=10)
        axes.grid(alpha=0.3)
    with atomic_path(path) as temporary:
        figure.savefig(temporary, format="png", dpi=110)


def _smooth(values: Sequence[float], decay: float = 0.6) -> list[float]:
    """Exponential moving average with bias correction."""
    smoothed, mean, weight = [], 0.0, 0.0
    for value in torch.tensor(list(values), dtype=torch.float64).tolist():
        mean, weight = decay * mean + (1 - decay) * value, decay * weight + 1 - decay
        smoothed.append(mean / weight)
    return smoothed


def _wrap(text: str, width: int) -> list[str]:
    """Lines of whole words, shorter than `width` letters each."""
    lines = [""]
    for word in text.split():
        if len(lines[-1]) + len(word) >= width:
            lines.append("")
        lines[-1] = f"{lines[-1]} {word}".strip()
    return lines


def side_by_side(rows: Sequence[Sequence[Image.Image]], labels: Sequence[str], least: int = 192) -> Image.Image:
    """Images in rows under the labels of their columns; small ones are enlarged by a whole number to `least` pixels."""
    scale = max(1, -(-least // max(image.width for row in rows for image in row)))
    width = max(image.width for row in rows for image in row) * scale
    heights = [max(image.height for image in row) * scale for row in rows]
    head, gap = 18, 6
    sheet = Image.new("RGB", (len(labels) * (width + gap) + gap, head + sum(h + gap for h in heights) + gap), "white")
    pen = ImageDraw.Draw(sheet)
    for column, label in enumerate(labels):
        pen.text((gap + column * (width + gap), 4), label[: width // 6], fill="black")
    top = head
    for row, height in zip(rows, heights, strict=True):
        for column, image in enumerate(row):
            large = image.resize((image.width * scale, image.height * scale), Image.Resampling.NEAREST)
            sheet.paste(large, (gap + column * (width + gap), top))
        top += height + gap
    return sheet
