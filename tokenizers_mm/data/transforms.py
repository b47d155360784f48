"""Cropping and scaling of PIL images. The ADM crops are the ImageNet protocol of most published tokenizers."""

import math
import random
from dataclasses import dataclass

from PIL import Image, ImageEnhance

from tokenizers_mm._check import require
from tokenizers_mm._images import middle, scale_and_cut
from tokenizers_mm.resolutions import covering_size


def center_crop(image: Image.Image, size: int) -> Image.Image:
    """The ADM centre crop: halve (box) while the smaller side is >= 2 * `size`, scale (bicubic), cut the middle."""
    image, scaled = _halved(image, size)
    return scale_and_cut(image, scaled, middle(scaled, size, size), Image.Resampling.BICUBIC)


def random_crop(image: Image.Image, size: int, rng: random.Random, min_fraction: float = 0.8) -> Image.Image:
    """The ADM random crop: the smaller side becomes a number in [size, ceil(size / min_fraction)], then a cut."""
    image, scaled = _halved(image, rng.randint(size, math.ceil(size / min_fraction)))
    top = rng.randint(0, scaled[0] - size)  # the original draws rows first
    left = rng.randint(0, scaled[1] - size)
    return scale_and_cut(image, scaled, (top, left, size, size), Image.Resampling.BICUBIC)


def random_cut(image: Image.Image, size: tuple[int, int], rng: random.Random) -> Image.Image:
    """Scale (bicubic) until `size` is covered, then cut at a random place along the longer way."""
    scaled = covering_size((image.height, image.width), size)
    left, top = rng.randint(0, scaled[1] - size[1]), rng.randint(0, scaled[0] - size[0])
    return scale_and_cut(image, scaled, (top, left, *size), Image.Resampling.BICUBIC)


def random_patch(
    image: Image.Image, size: tuple[int, int], rng: random.Random, zoom: tuple[float, float]
) -> Image.Image:
    """A patch of `size` (height, width) at a random place and scale: `zoom` bounds output pixels per picture pixel."""
    height, width = size
    least = max(height / image.height, width / image.width)
    factor = max(least, math.exp(rng.uniform(math.log(zoom[0]), math.log(zoom[1]))))
    cut_h, cut_w = min(image.height, height / factor), min(image.width, width / factor)
    left, top = rng.uniform(0, image.width - cut_w), rng.uniform(0, image.height - cut_h)
    return image.resize(
        (width, height), Image.Resampling.BICUBIC, (left, top, left + cut_w, top + cut_h), reducing_gap=3.0
    )


def random_flip(image: Image.Image, rng: random.Random, turns: bool = False) -> Image.Image:
    """Mirror left to right half of the time; with `turns` also turn by a random multiple of 90 degrees."""
    if rng.random() < 0.5:
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    quarter = (None, Image.Transpose.ROTATE_90, Image.Transpose.ROTATE_180, Image.Transpose.ROTATE_270)
    turn = rng.choice(quarter) if turns else None
    return image if turn is None else image.transpose(turn)


@dataclass(frozen=True)
class Augmentation:
    """Random changes beside mirroring.

    colour: strength of those of brightness, contrast, saturation and hue, from 0 to 1. channels: share of the images
    whose channels change places. turns: by multiples of 90 degrees; of a square image, whose size stays.
    """

    colour: float = 0.0
    channels: float = 0.0
    turns: bool = False


def augmented(image: Image.Image, options: Augmentation, rng: random.Random) -> Image.Image:
    """An RGB image changed at random."""
    image = random_flip(image, rng, options.turns)
    if options.colour > 0:
        for enhance in (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color):
            image = enhance(image).enhance(1 + options.colour * rng.uniform(-1, 1))
        hue, saturation, value = image.convert("HSV").split()
        turn = round(128 * options.colour * rng.uniform(-1, 1))
        hue = hue.point([(h + turn) % 256 for h in range(256)])
        image = Image.merge("HSV", (hue, saturation, value)).convert("RGB")
    if options.channels > 0 and rng.random() < options.channels:
        image = Image.merge("RGB", rng.sample(image.split(), 3))
    return image


def _halved(image: Image.Image, size: int) -> tuple[Image.Image, tuple[int, int]]:
    """The image halved (box) while its smaller side is >= 2 * `size`, and the (height, width) to scale it to."""
    require(size > 0 and min(image.size) > 0, "size", "a positive number of pixels", size)
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = size / min(image.size)
    return image, (round(image.height * scale), round(image.width * scale))
