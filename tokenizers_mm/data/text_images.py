"""Images of rendered text: a few lines of random words in random sizes, colours and directions."""

import random
import string

from PIL import Image, ImageDraw, ImageFont

TEXT = """and bread cloud day every far green house ink just kind light most north open paper quick river stone tree
under voice water exit young zero Rome Paris STOP OPEN 7 12 365 1984 $9 50% A&B (c) why? yes! No. x+y=z"""
"""Words that lines are made of, beside random letters and digits."""


def text_image(rng: random.Random, size: tuple[int, int]) -> Image.Image:
    """RGB image of `size` (height, width): dark text on light or light on dark, in some images turned a little."""
    (height, width), words = size, TEXT.split()
    dark, light = (_colour(rng, 0, 110), _colour(rng, 145, 255))
    ground, ink = (light, dark) if rng.random() < 0.6 else (dark, light)
    points = rng.choice((11, 13, 16, 20, 26, 32, 40))
    font = ImageFont.load_default(points)
    side = round(1.5 * max(height, width))
    image = Image.new("RGB", (side, side), ground)
    draw = ImageDraw.Draw(image)
    for y in range(-rng.randrange(points), side, round(points * rng.uniform(1.1, 1.5))):
        line = [rng.choice(words) if rng.random() < 0.7 else _letters(rng) for _ in range(3 + 60 // points)]
        draw.text((-rng.randrange(2 * points), y), " ".join(line), fill=ink, font=font)
    if rng.random() < 0.3:
        image = image.rotate(rng.uniform(-15, 15), Image.Resampling.BICUBIC, fillcolor=ground)
    left, top = (side - width) // 2, (side - height) // 2
    return image.crop((left, top, left + width, top + height))


def _letters(rng: random.Random) -> str:
    return "".join(rng.choice(string.ascii_letters + string.digits) for _ in range(rng.randint(2, 7)))


def _colour(rng: random.Random, low: int, high: int) -> tuple[int, int, int]:
    if rng.random() < 0.4:
        value = rng.choice((low, high))
        return (value, value, value)
    return (rng.randint(low, high), rng.randint(low, high), rng.randint(low, high))
