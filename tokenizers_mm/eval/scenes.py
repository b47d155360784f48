"""A fixed rule that says what the largest object of a picture of a scene is: pixels only, no learned part."""

import numpy as np
from PIL import Image

from tokenizers_mm.data.scenes import COLOURS, GROUNDS, SHAPES, Scene, SceneObject

SMALLEST = 0.02
"""Share of the picture below which a patch of one colour is no object."""


def judge_scene(picture: Image.Image) -> tuple[str, str] | None:
    """(shape, colour) of the largest object, or None where there is none.

    The ground is the one nearest to the border's median. Every pixel takes the nearest of the colours and that ground;
    the largest connected patch of a colour is the object; its shape is the one that, drawn into the patch's box,
    overlaps the patch most.
    """
    pixels = np.asarray(picture.convert("RGB"), dtype=np.float64)
    border = np.concatenate([pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]])
    ground = _nearest(np.median(border, 0), list(GROUNDS.values()))
    palette = np.array([*COLOURS.values(), list(GROUNDS.values())[ground]], dtype=np.float64)
    nearest = np.square(pixels[:, :, None] - palette).sum(-1).argmin(-1)
    patches = [(patch, index) for index in range(len(COLOURS)) for patch in _patches(nearest == index)]
    if not patches:
        return None
    patch, colour = max(patches, key=lambda item: item[0].sum())
    if patch.mean() < SMALLEST:
        return None
    return max(SHAPES, key=lambda shape: _overlap(patch, shape)), tuple(COLOURS)[colour]


def _nearest(colour: np.ndarray, palette: list[tuple[int, int, int]]) -> int:
    return int(np.square(np.array(palette, dtype=np.float64) - colour).sum(-1).argmin())


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
