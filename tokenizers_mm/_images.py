"""Images in and out: files and PIL images to float tensors [3, H, W] in [-1, 1], and back."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from tokenizers_mm._check import fail, require
from tokenizers_mm.resolutions import contained_size, covering_size

MAX_PIXELS = 256 * 1024 * 1024
"""Larger pictures are refused before they are decoded."""

GREY = (127, 127, 127)

Fit = Literal["refuse", "crop", "pad", "resize"]
"""What to do with a picture of a size that the tokenizer does not take."""


def read_image(path: str | os.PathLike[str]) -> Image.Image:
    """A picture file as RGB, upright. ValueError, with the path, for what is missing, corrupt, huge or no picture."""
    name = f"image {Path(path)}"
    if not Path(path).is_file():
        fail(name, "a picture file", "no such file")
    try:
        with Image.open(path) as image:
            width, height = image.size
            if width * height > MAX_PIXELS:
                fail(name, f"at most {MAX_PIXELS} pixels", f"{height} x {width}")
            return _to_rgb(ImageOps.exif_transpose(image))
    except (OSError, SyntaxError, Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        fail(name, "a readable picture file", f"{type(error).__name__}: {error}")


def image_to_tensor(image: Image.Image) -> Tensor:
    """A PIL image as float32 [3, H, W] in [-1, 1]."""
    array = np.array(_to_rgb(image), dtype=np.uint8)
    return torch.from_numpy(array).permute(2, 0, 1).to(torch.float32).div_(127.5).sub_(1.0).contiguous()


def tensor_to_images(x: Tensor) -> list[Image.Image]:
    """Float [B, 3, H, W] in [-1, 1] as PIL images; values outside are clamped, non-finite ones refused."""
    require(x.ndim == 4 and x.shape[1] == 3 and x.is_floating_point(), "x", "float [B, 3, H, W]", x)
    require(bool(torch.isfinite(x).all()), "x", "finite values", "NaN or infinity")
    array = x.detach().float().mul(127.5).add(128).clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()
    return [Image.fromarray(item) for item in array]


def fit_image(image: Image.Image, height: int, width: int, how: Fit) -> Image.Image:
    """Bring a picture to a size: cover and crop the middle, pad with grey to the shape, or stretch. Bicubic."""
    if image.size == (width, height):
        return image
    if how == "refuse":
        fail(
            "image", f"{height} x {width} pixels (or fit='crop', 'pad' or 'resize')", f"{image.height} x {image.width}"
        )
    if how == "crop":
        return ImageOps.fit(image, (width, height), Image.Resampling.BICUBIC)
    if how == "pad":
        down = max(image.height, round(image.width * height / width))
        across = max(image.width, round(image.height * width / height))
        return pad_around(image, down, across).resize((width, height), Image.Resampling.BICUBIC)
    if how == "resize":
        return image.resize((width, height), Image.Resampling.BICUBIC)
    fail("fit", "'refuse', 'crop', 'pad' or 'resize'", how)


def fit_multiple(image: Image.Image, multiple: int, how: Fit) -> Image.Image:
    """Bring the sides of a picture to multiples: cut the middle, add grey around, or scale (bicubic) to the nearest."""
    height, width = image.height, image.width
    if height % multiple == 0 and width % multiple == 0:
        return image
    if how == "crop":
        down = height // multiple * multiple, width // multiple * multiple
        require(min(down) > 0, "image", f"at least {multiple} pixels on each side", f"{height} x {width}")
        return cut_middle(image, *down)
    if how == "pad":
        return pad_around(image, -(-height // multiple) * multiple, -(-width // multiple) * multiple)
    rows, columns = (max(1, round(side / multiple)) * multiple for side in (height, width))
    return fit_image(image, rows, columns, how)


def cut_middle(image: Image.Image, height: int, width: int) -> Image.Image:
    """The middle of a picture, no larger than it, without resampling; takes back what `pad_around` added."""
    require(image.height >= height and image.width >= width, "image", f"at least {height} x {width}", image.size[::-1])
    left, top = (image.width - width) // 2, (image.height - height) // 2
    return image.crop((left, top, left + width, top + height))


def pad_around(image: Image.Image, height: int, width: int, colour: tuple[int, int, int] = GREY) -> Image.Image:
    """A picture in the middle of a larger canvas, without resampling."""
    require(image.height <= height and image.width <= width, "image", f"at most {height} x {width}", image.size[::-1])
    canvas = Image.new("RGB", (width, height), colour)
    canvas.paste(image, ((width - image.width) // 2, (height - image.height) // 2))
    return canvas


def cover_and_cut(image: Image.Image, height: int, width: int) -> Image.Image:
    """Scale (Lanczos) until the size is covered, then cut the middle: how training pictures meet an anchor size."""
    rows, columns = covering_size((image.height, image.width), (height, width))
    return cut_middle(image.resize((columns, rows), Image.Resampling.LANCZOS), height, width)


def contain_and_pad(image: Image.Image, height: int, width: int) -> Image.Image:
    """Scale (Lanczos) to fit inside the size, white around it: how pictures to be edited meet an anchor size."""
    rows, columns = contained_size((image.height, image.width), (height, width))
    return pad_around(image.resize((columns, rows), Image.Resampling.LANCZOS), height, width, (255, 255, 255))


def undo_contain_and_pad(image: Image.Image, height: int, width: int) -> Image.Image:
    """Cut the padding of a picture that was height x width before `contain_and_pad`, and scale back to that size."""
    rows, columns = contained_size((height, width), (image.height, image.width))
    return cut_middle(image, rows, columns).resize((width, height), Image.Resampling.LANCZOS)


def open_images(images: Any) -> list[Image.Image]:
    """One or several PIL images or paths as RGB images."""
    items = images if isinstance(images, Sequence) and not isinstance(images, str) else [images]
    require(len(items) > 0, "images", "at least one image", "none")
    opened = []
    for item in items:
        if isinstance(item, Image.Image):
            opened.append(_to_rgb(item))
        elif isinstance(item, (str, os.PathLike)):
            opened.append(read_image(item))
        else:
            fail("images", "a tensor [B, 3, H, W], PIL images or paths", type(item).__name__)
    return opened


def check_images(x: Tensor, name: str = "images") -> None:
    """Refuse what is not a finite float [B, 3, H, W] in [-1, 1] (a little overshoot of resampling is allowed)."""
    require(
        x.ndim == 4 and x.shape[1] == 3 and x.is_floating_point() and x.shape[0] > 0,
        name,
        "float [B, 3, H, W] in [-1, 1]",
        x,
    )
    low, high = (float(v) for v in torch.aminmax(x.detach()))
    require(low >= -1.5 and high <= 1.5, name, "finite values in [-1, 1]", f"values from {low:.4g} to {high:.4g}")


def _to_rgb(image: Image.Image) -> Image.Image:
    """RGB; 16-bit greys are scaled down, transparency is laid on white."""
    if image.mode.startswith("I") or image.mode == "F":
        array = np.asarray(image, dtype=np.float64)
        scale = 257.0 if array.max(initial=0) > 255 else 1.0
        return Image.fromarray((array / scale).clip(0, 255).astype(np.uint8)).convert("RGB")
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        rgba = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", rgba.size, (255, 255, 255, 255)), rgba).convert("RGB")
    return image.convert("RGB")
