"""A fixed rule that says what the largest object of a picture of a scene is: pixels only, no learned part."""

import numpy as np
from PIL import Image

from tokenizers_mm.data.scenes import COLOURS, SHAPES, Scene, SceneObject

SMALLEST = 0.02
"""Share of the picture below which a patch is no object."""

APART = 48.0
"""Distance from the ground, in 8-bit RGB, from which a pixel is part of an object; the colours are 66 apart or more."""


def judge_scene(picture: Image.Image) -> tuple[str, str] | None:
    """(shape, colour) of the largest object, or None where there is none.

    The ground is the median of the border; objects are the connected patches of pixels apart from it. The colour of the
    largest is the one nearest to the median of its inner half, the pixels farthest from the ground. Its shape is the
    one that, drawn into its box, overlaps it most; its edge lies half-way between its colour and the ground.
    """
    pixels = np.asarray(picture.convert("RGB"), dtype=np.float64)
    border = np.concatenate([pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]])
    ground = np.median(border, 0)
    apart = np.sqrt(np.square(pixels - ground).sum(-1))
    patch = _largest(apart > APART)
    if patch.mean() < SMALLEST:
        return None
    inner = np.median(pixels[patch & (apart >= np.median(apart[patch]))], 0)
    palette = np.array(list(COLOURS.values()), dtype=np.float64)
    colour = tuple(COLOURS)[int(np.square(palette - inner).sum(-1).argmin())]
    nearer = np.square(pixels - inner).sum(-1) < np.square(pixels - ground).sum(-1)
    patch = _largest(nearer & patch)
    if not patch.any():
        return None
    return max(SHAPES, key=lambda shape: _overlap(patch, shape)), colour


def _largest(mask: np.ndarray) -> np.ndarray:
    """The largest connected part of a mask; the mask itself where it is empty."""
    return max(_patches(mask), key=lambda patch: int(patch.sum()), default=mask)


def _patches(mask: np.ndarray) -> list[np.ndarray]:
    """The connected parts of a mask (four neighbours)."""
    left, patches = mask.copy(), []
    while left.any():
        row, column = (int(v[0]) for v in left.nonzero())
        patch, stack = np.zeros_like(mask), [(row, column)]
        left[row, column] = False
        while stack:
            y, x = stack.pop()
            patch[y, x] = True
            for v, u in ((y - 1, x), (y + 1, x), (y, x - 1), (y, x + 1)):
                if 0 <= v < mask.shape[0] and 0 <= u < mask.shape[1] and left[v, u]:
                    left[v, u] = False
                    stack.append((v, u))
        patches.append(patch)
    return patches


def _overlap(patch: np.ndarray, shape: str) -> float:
    """Intersection over union of a patch and a shape drawn into its box."""
    side = patch.shape[0]
    rows, columns = (np.flatnonzero(patch.any(axis)) for axis in (1, 0))
    (top, bottom), (left, right) = ((v[0] / side, (v[-1] + 1) / side) for v in (rows, columns))
    # Widths and heights of the shapes in radii, and how far the middle of the box lies below the centre.
    width, height, below = {"square": (1.72, 1.72, 0.0), "triangle": (1.9, 1.75, -0.125)}.get(shape, (2.0, 2.0, 0.0))
    radius = ((right - left) / width + (bottom - top) / height) / 2
    centre = ((left + right) / 2, (top + bottom) / 2 - below * radius)
    drawn = Scene((SceneObject(shape, "white", centre, radius),), "black").render(side).convert("L")
    mask = np.asarray(drawn) > 128
    return float((mask & patch).sum() / max(1, (mask | patch).sum()))
