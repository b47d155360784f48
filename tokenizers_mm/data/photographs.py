"""Photographs that come with scikit-image, scikit-learn and matplotlib: real images without a download.

They are split by photograph: no part of a held-out photograph is ever seen in training.
"""

import importlib.util
import random
from functools import lru_cache
from pathlib import Path
from typing import Literal

from PIL import Image

from tokenizers_mm._check import fail
from tokenizers_mm._images import read_image

Split = Literal["train", "heldout"]

_SKIMAGE = ("skimage", "data")
_SKLEARN = ("sklearn", "datasets/images")
_MATPLOTLIB = ("matplotlib", "mpl-data/sample_data")

PHOTOGRAPHS: dict[Split, dict[str, tuple[str, str]]] = {
    "train": {
        "astronaut.png": _SKIMAGE,
        "brick.png": _SKIMAGE,
        "camera.png": _SKIMAGE,
        "china.jpg": _SKLEARN,
        "coins.png": _SKIMAGE,
        "color.png": _SKIMAGE,
        "grace_hopper.jpg": _MATPLOTLIB,
        "grass.png": _SKIMAGE,
        "gravel.png": _SKIMAGE,
        "hubble_deep_field.jpg": _SKIMAGE,
        "ihc.png": _SKIMAGE,
        "moon.png": _SKIMAGE,
        "motorcycle_left.png": _SKIMAGE,
        "page.png": _SKIMAGE,
        "retina.jpg": _SKIMAGE,
        "rocket.jpg": _SKIMAGE,
    },
    "heldout": {"chelsea.png": _SKIMAGE, "coffee.png": _SKIMAGE, "flower.jpg": _SKLEARN},
}
"""File name to (package, folder in it). Chelsea is a cat, coffee a cup on a table, flower a dahlia;
astronaut and grace_hopper are portraits, page is printed text."""


@lru_cache(maxsize=2)
def photographs(split: Split) -> dict[str, Image.Image]:
    """The photographs of a split by name, RGB, decoded once per process."""
    if split not in PHOTOGRAPHS:
        fail("split", f"one of {sorted(PHOTOGRAPHS)}", repr(split))
    return {name: read_image(_path(name, *place)) for name, place in PHOTOGRAPHS[split].items()}


def fixed_crops(split: Split, count: int, side: int) -> list[Image.Image]:
    """`count` square crops of `side` pixels at full resolution, spread evenly over the photographs, always the same."""
    rng = random.Random(0)
    pictures = list(photographs(split).values())
    crops = []
    for index in range(count):
        picture = pictures[index % len(pictures)]
        left, top = rng.randint(0, picture.width - side), rng.randint(0, picture.height - side)
        crops.append(picture.crop((left, top, left + side, top + side)))
    return crops


def _path(name: str, package: str, folder: str) -> Path:
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        pip = {"skimage": "scikit-image", "sklearn": "scikit-learn"}.get(package, package)
        fail(f"photograph {name}", f"the package {pip} to be installed", "no such package")
    return Path(spec.submodule_search_locations[0]) / folder / name
