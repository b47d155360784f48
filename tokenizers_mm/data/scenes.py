"""Rendered scenes with captions: a few coloured shapes on a plain ground. A seed decides everything.

Training and held-out scenes are two families that share no seed; the largest object is clearly the largest.
"""

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from PIL import Image, ImageDraw
from torch import Tensor

from tokenizers_mm._check import fail
from tokenizers_mm._images import image_to_tensor

Split = Literal["train", "heldout"]

SHAPES = ("circle", "square", "triangle", "cross")
COLOURS = {
    "red": (214, 39, 40),
    "green": (44, 150, 44),
    "blue": (40, 80, 210),
    "yellow": (240, 214, 40),
    "purple": (140, 60, 180),
    "orange": (255, 140, 20),
    "cyan": (40, 200, 210),
    "white": (245, 245, 245),
}
GROUNDS = {"black": (24, 24, 26), "grey": (112, 112, 112), "brown": (92, 64, 44)}
ROWS, COLUMNS = ("top", "middle", "bottom"), ("left", "centre", "right")

_OVERSAMPLE = 4
_NUM_SCENES = 1 << 40


@dataclass(frozen=True)
class SceneObject:
    """One shape: its centre (x, y) and radius are fractions of the side of the picture."""

    shape: str
    colour: str
    centre: tuple[float, float]
    radius: float

    @property
    def size(self) -> str:
        """In words: large or small."""
        return "large" if self.radius >= 0.2 else "small"

    @property
    def place(self) -> str:
        """In words: a row and a column of a 3 x 3 grid."""
        row, column = ROWS[min(2, int(self.centre[1] * 3))], COLUMNS[min(2, int(self.centre[0] * 3))]
        return "middle" if (row, column) == ("middle", "centre") else f"{row} {column}"

    @property
    def caption(self) -> str:
        """For example: large red circle at the top left."""
        return f"{self.size} {self.colour} {self.shape} at the {self.place}"


@dataclass(frozen=True)
class Scene:
    """Objects, the largest first, on a ground."""

    objects: tuple[SceneObject, ...]
    ground: str

    @property
    def caption(self) -> str:
        """All objects, the largest first, and the ground."""
        return " and ".join(f"a {thing.caption}" for thing in self.objects) + f" on {self.ground}"

    def render(self, side: int) -> Image.Image:
        """RGB, side x side pixels, with smooth edges."""
        large = side * _OVERSAMPLE
        image = Image.new("RGB", (large, large), GROUNDS[self.ground])
        draw = ImageDraw.Draw(image)
        for thing in self.objects:
            _draw(draw, thing, large)
        return image.resize((side, side), Image.Resampling.BOX)


def make_scene(index: int, split: Split = "train") -> Scene:
    """The scene of a number from 0 to 2**40 - 1."""
    if split not in ("train", "heldout") or not 0 <= index < _NUM_SCENES:
        fail("scene", "split 'train' or 'heldout' and an index from 0 to 2**40 - 1", (split, index))
    rng = random.Random(f"{split} {index}")  # text, because nearby integers can give the same stream
    ground = rng.choice(tuple(GROUNDS))
    first = _object(rng, rng.uniform(0.24, 0.34), SHAPES, tuple(COLOURS))
    things = [first]
    for _ in range(rng.randint(0, 2)):
        radius = rng.uniform(0.08, 0.12)
        for _ in range(20):  # a free place; a crowded scene simply has fewer objects
            thing = _object(rng, radius, SHAPES, tuple(COLOURS))
            if all(math.dist(thing.centre, other.centre) > (radius + other.radius) * 1.15 for other in things):
                things.append(thing)
                break
    return Scene(tuple(things), ground)


def scene_images(scenes: Sequence[Scene], side: int) -> Tensor:
    """Scenes as images, float [N, 3, side, side] in [-1, 1]."""
    return torch.stack([image_to_tensor(scene.render(side)) for scene in scenes])


def _object(rng: random.Random, radius: float, shapes: tuple[str, ...], colours: tuple[str, ...]) -> SceneObject:
    x, y = (rng.uniform(radius + 0.02, 0.98 - radius) for _ in range(2))
    return SceneObject(rng.choice(shapes), rng.choice(colours), (x, y), radius)


def _draw(draw: ImageDraw.ImageDraw, thing: SceneObject, side: int) -> None:
    x, y, r = thing.centre[0] * side, thing.centre[1] * side, thing.radius * side
    fill = COLOURS[thing.colour]
    if thing.shape == "circle":
        draw.ellipse((x - r, y - r, x + r, y + r), fill=fill)
    elif thing.shape == "square":
        half = r * 0.86
        draw.rectangle((x - half, y - half, x + half, y + half), fill=fill)
    elif thing.shape == "triangle":
        draw.polygon([(x, y - r), (x - r * 0.95, y + r * 0.75), (x + r * 0.95, y + r * 0.75)], fill=fill)
    else:
        arm = r * 0.36
        draw.rectangle((x - r, y - arm, x + r, y + arm), fill=fill)
        draw.rectangle((x - arm, y - r, x + arm, y + r), fill=fill)
