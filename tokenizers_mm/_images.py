"""Images in and out: files and PIL images to float tensors [3, H, W] in [-1, 1], and back.

Every image becomes upright 8-bit RGB in sRGB by one rule, which never looks at the values of the pixels:

    orientation   EXIF orientations 2 to 8 are applied, of files and of PIL images; an EXIF that cannot be read, or says
                  anything else, means "not rotated"
    depth         16-bit grey ("I;16", and "I", which is how Pillow opens many 16-bit files): 65535 is white; float
                  grey ("F"): 1.0 is white; values outside are clamped, NaN is refused. 16-bit colour is cut to its
                  upper 8 bits by Pillow
    colour        an ICC profile is converted to sRGB (perceptual intent) where Pillow has LittleCMS; a profile that
                  cannot be read is ignored
    transparency  laid on white
    frames        the first of an animation; a PIL image gives the frame it stands at
"""

import os
import sys
import threading
import warnings
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from functools import lru_cache
from io import BytesIO
from pathlib import Path
from typing import Any, Literal, TypeVar

import numpy as np
import torch
from PIL import Image, ImageCms, ImageOps
from torch import Tensor

from tokenizers_mm._check import fail, finite_extremes, require
from tokenizers_mm._files import kind_of
from tokenizers_mm.resolutions import contained_size, covering_size

MAX_PIXELS = 256 * 1024 * 1024
"""Larger images are refused before they are decoded."""

MAX_CANVAS = 64 * 1024 * 1024
"""Pixels of an intermediate image, unless the image itself has half as many: larger ones are refused or avoided."""

AHEAD = 16
"""Images that each thread of `run_ahead` may have ready."""

GREY = (127, 127, 127)

Item = TypeVar("Item")
Result = TypeVar("Result")

Fit = Literal["refuse", "crop", "pad", "resize"]
"""Treatment of an image of a size that the tokenizer does not take."""

ORIENTATION, TIFF_WIDTH, TIFF_HEIGHT = 0x0112, 0x0100, 0x0101
"""Tags of EXIF and TIFF."""

UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""EXIF orientation -> what brings the image upright."""


def read_image(path: str | os.PathLike[str]) -> Image.Image:
    """An image file as upright RGB. ValueError, with the path, for what is missing, broken, huge or no image."""
    name = f"image {Path(path)}"
    with _opened(path, name) as image:
        return upright_rgb(image, name)


def decode_image(data: bytes, name: str) -> Image.Image:
    """The bytes of an image file as upright RGB. ValueError, with the name, for what is broken, huge or no image."""
    with _decoding(name), Image.open(BytesIO(data)) as image:
        return upright_rgb(image, name)


def read_size(path: str | os.PathLike[str]) -> tuple[int, int]:
    """(height, width) of an image file, upright, from its header. ValueError as of `read_image`."""
    with _opened(path, f"image {Path(path)}") as image:
        return _upright_size(image)


def decode_size(data: bytes, name: str) -> tuple[int, int]:
    """(height, width) of the bytes of an image file, as `read_size`."""
    with _decoding(name), Image.open(BytesIO(data)) as image:
        return _upright_size(image)


def _upright_size(image: Image.Image) -> tuple[int, int]:
    width, height = image.size
    # The EXIF of a PNG can stand behind its pixels, which are not read; of a TIFF, newer Pillow has swapped the sides.
    orientation = 1 if image.format == "PNG" and "exif" not in image.info else _orientation(image)
    if image.format == "TIFF":
        tags = image.getexif()
        width, height = tags.get(TIFF_WIDTH, width), tags.get(TIFF_HEIGHT, height)
    return (width, height) if orientation >= 5 else (height, width)


@contextmanager
def _opened(path: str | os.PathLike[str], name: str) -> Iterator[Image.Image]:
    kind = kind_of(path)
    require(kind == "a file", name, "an image file", kind)
    with _decoding(name), Image.open(path) as image:
        yield image


@contextmanager
def _decoding(name: str) -> Iterator[None]:
    """The boundary of decoding: whatever Pillow raises in the block becomes one ValueError that begins with `name`."""
    try:
        with _quiet_pillow():
            yield
    except Exception as error:  # decoders raise errors of all kinds
        if isinstance(error, ValueError) and str(error).startswith(f"{name}: "):
            raise
        fail(name, "a readable image", f"{type(error).__name__}: {error}")


def upright_rgb(image: Image.Image, name: str = "image") -> Image.Image:
    """Any PIL image as upright 8-bit RGB without metadata (see the rules above); an image that is so, as it is.

    name: what an error begins with.
    """
    if image.mode == "RGB" and not image.info and not hasattr(image, "filename"):
        return image
    with _decoding(name):
        size = f"{image.height} x {image.width}"
        require(image.width * image.height <= MAX_PIXELS, name, f"at most {MAX_PIXELS} pixels", size)
        require(image.format != "EPS", name, "pixels", "EPS, a program that draws them")
        _decode(image)
        orientation = _orientation(image)
        made = _to_rgb(image, name)
        if orientation in UPRIGHT:
            made = made.transpose(UPRIGHT[orientation])
        made.info = {}  # so that nothing is applied twice
        return made


def _decode(image: Image.Image) -> None:
    """Decode the pixels. A TIFF whose tags fail after its pixels were decoded keeps them."""
    if image.format == "TIFF":
        image.filename = ""  # type: ignore[attr-defined]  # or Pillow maps it into memory, and forgets to turn it
    try:
        image.load()
    except Exception:  # part of the boundary of decoding
        if image.format != "TIFF":
            raise
        image.load()  # does nothing where there are pixels


def _orientation(image: Image.Image) -> int:
    """The EXIF orientation, 1 to 8; 1 where there is none or where the EXIF is broken."""
    try:
        value = image.getexif().get(ORIENTATION, 1)
    except Exception:  # part of the boundary of decoding
        return 1
    return value if isinstance(value, int) and 1 <= value <= 8 else 1


def _to_rgb(image: Image.Image, name: str) -> Image.Image:
    """RGB by the rules of depth, colour and transparency."""
    if image.mode.startswith("I") or image.mode == "F":
        return _deep_grey_to_rgb(image, name)
    if image.mode in ("La", "RGBa"):
        image = image.convert(image.mode.replace("a", "A"))
    clear = image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info
    profile = image.info.get("icc_profile")
    if clear or image.mode in ("P", "PA"):
        image = image.convert("RGBA")
    if isinstance(profile, bytes):
        image = _to_srgb(image, profile)
    if clear:
        return Image.alpha_composite(Image.new("RGBA", image.size, (255, 255, 255, 255)), image).convert("RGB")
    return image.convert("RGB")


def _deep_grey_to_rgb(image: Image.Image, name: str) -> Image.Image:
    array = np.asarray(image).astype(np.float32)
    require(not np.isnan(array).any(), name, "numbers as pixels", "NaN")
    grey = np.rint(array.clip(0, 1) * 255 if image.mode == "F" else array.clip(0, 65535) / 257).astype(np.uint8)
    clear = image.info.get("transparency")
    if isinstance(clear, int):
        grey[array == clear] = 255
    return Image.fromarray(grey).convert("RGB")


def _to_srgb(image: Image.Image, profile: bytes) -> Image.Image:
    """The image with its colours in sRGB: RGBA for RGBA, else RGB; as it is where the profile is no use."""
    mode = "RGBA" if image.mode == "RGBA" else "RGB"
    try:
        transform = _srgb_transform(profile, image.mode, mode)
        return image if transform is None else ImageCms.applyTransform(image, transform) or image
    except (ImageCms.PyCMSError, OSError, ImportError, ValueError, TypeError):
        return image


@lru_cache(maxsize=16)
def _srgb_transform(profile: bytes, source: str, target: str) -> Any:
    """The transform from a profile to sRGB; None where it moves no colour by more than 3: the profile is sRGB."""
    opened = ImageCms.ImageCmsProfile(BytesIO(profile))
    transform = ImageCms.buildTransform(opened, ImageCms.createProfile("sRGB"), source, target)
    if source == target:
        levels = np.arange(0, 256, 51, dtype=np.uint8)
        colours = np.stack(np.meshgrid(levels, levels, levels), -1).reshape(1, -1, 3)
        probe = Image.fromarray(colours).convert(source)
        moved = np.asarray(ImageCms.applyTransform(probe, transform)).astype(int) - np.asarray(probe)
        if np.abs(moved).max() <= 3:
            return None
    return transform


_silence = threading.Lock()
_silent: list[Any] = [0, None]


@contextmanager
def _quiet_pillow() -> Iterator[None]:
    """No warnings of Pillow's about odd files, in whichever threads; the filters come back when the last one leaves."""
    if getattr(sys.flags, "context_aware_warnings", 0):  # every thread has filters of its own
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", module=r"PIL\.")
            yield
        return
    with _silence:
        if _silent[0] == 0:
            _silent[1] = warnings.catch_warnings()
            _silent[1].__enter__()
            warnings.filterwarnings("ignore", module=r"PIL\.")
        _silent[0] += 1
    try:
        yield
    finally:
        with _silence:
            _silent[0] -= 1
            if _silent[0] == 0:
                _silent[1].__exit__(None, None, None)


def image_to_tensor(image: Image.Image) -> Tensor:
    """A PIL image as float32 [3, H, W] in [-1, 1]."""
    return levels_to_tensor([image_levels(image)])[0]


def image_levels(image: Image.Image) -> np.ndarray:
    """The 8-bit levels of a PIL image, uint8 [H, W, 3]."""
    return np.asarray(upright_rgb(image), dtype=np.uint8)


def levels_to_tensor(levels: Sequence[np.ndarray]) -> Tensor:
    """Levels uint8 [H, W, 3] of several images of one size as float32 [B, 3, H, W] in [-1, 1]."""
    x = torch.from_numpy(np.stack(levels)).permute(0, 3, 1, 2)
    return x.to(torch.float32, memory_format=torch.contiguous_format).div_(127.5).sub_(1.0)


def tensor_to_images(x: Tensor) -> list[Image.Image]:
    """Float [B, 3, H, W] in [-1, 1] as PIL images; values outside are clamped, non-finite ones refused."""
    require(x.ndim == 4 and x.shape[1] == 3 and x.is_floating_point(), "x", "float [B, 3, H, W]", x)
    finite_extremes(x, "x")
    return [Image.merge("RGB", [Image.fromarray(part) for part in item]) for item in to_bytes(x.detach()).cpu().numpy()]


def to_bytes(x: Tensor, dtype: torch.dtype = torch.uint8) -> Tensor:
    """Values in [-1, 1] as whole numbers from 0 to 255 of a dtype, rounded; those outside are clamped."""
    return x.float().mul(127.5).add_(128).clamp_(0, 255).floor_().to(dtype)


def fit_image(image: Image.Image, height: int, width: int, how: Fit) -> Image.Image:
    """Bring an image to a size: cover and crop the middle, pad with grey to the shape, or stretch. Bicubic."""
    if image.size == (width, height):
        return image
    if how == "refuse":
        fail(
            "image", f"{height} x {width} pixels (or fit='crop', 'pad' or 'resize')", f"{image.height} x {image.width}"
        )
    _check_canvas(image, height, width)
    if how == "crop":
        return ImageOps.fit(image, (width, height), Image.Resampling.BICUBIC)
    if how == "pad":
        return _pad_to_shape(image, height, width).resize((width, height), Image.Resampling.BICUBIC)
    if how == "resize":
        return image.resize((width, height), Image.Resampling.BICUBIC)
    fail("fit", "'refuse', 'crop', 'pad' or 'resize'", how)


def _pad_to_shape(image: Image.Image, height: int, width: int) -> Image.Image:
    """Grey around an image until it has the shape of height x width.

    Where that canvas would be too large, the side that gets no padding is scaled to its target first: bicubic scaling
    is separable, so only the rounding between the two directions differs.
    """
    down = max(image.height, round(image.width * height / width))
    across = max(image.width, round(image.height * width / height))
    if not _fits_canvas(image, down, across):
        if down > image.height:
            across = width
            image = image.resize((width, image.height), Image.Resampling.BICUBIC)
        else:
            down = height
            image = image.resize((image.width, height), Image.Resampling.BICUBIC)
    return pad_around(image, down, across)


def _fits_canvas(image: Image.Image, height: int, width: int) -> bool:
    return height * width <= max(MAX_CANVAS, 2 * image.width * image.height)


def fit_multiple(image: Image.Image, multiple: int, how: Fit) -> Image.Image:
    """Bring the sides of an image to multiples: cut the middle, add grey around, or scale (bicubic) to the nearest."""
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
    """The middle of an image, no larger than it, without resampling; takes back what `pad_around` added."""
    require(image.height >= height and image.width >= width, "image", f"at least {height} x {width}", image.size[::-1])
    left, top = (image.width - width) // 2, (image.height - height) // 2
    return image.crop((left, top, left + width, top + height))


def pad_around(image: Image.Image, height: int, width: int, colour: tuple[int, int, int] = GREY) -> Image.Image:
    """An image in the middle of a larger canvas, without resampling."""
    require(image.height <= height and image.width <= width, "image", f"at most {height} x {width}", image.size[::-1])
    _check_canvas(image, height, width)
    canvas = Image.new("RGB", (width, height), colour)
    canvas.paste(image, ((width - image.width) // 2, (height - image.height) // 2))
    return canvas


def _check_canvas(image: Image.Image, height: int, width: int) -> None:
    got = f"{height} x {width} from an image of {image.height} x {image.width}"
    require(_fits_canvas(image, height, width), "image", f"a shape that needs at most {MAX_CANVAS} pixels", got)


def scale_and_cut(
    image: Image.Image, scaled: tuple[int, int], window: tuple[int, int, int, int], how: Image.Resampling
) -> Image.Image:
    """Scale to `scaled` (height, width) and cut the window (top, left, height, width) out of that.

    Where the scaled image would be too large, only the part of the image under the window is scaled.
    """
    (rows, columns), (top, left, height, width) = scaled, window
    if _fits_canvas(image, rows, columns):
        return image.resize((columns, rows), how).crop((left, top, left + width, top + height))
    x, y = image.width / columns, image.height / rows
    right, bottom = min((left + width) * x, image.width), min((top + height) * y, image.height)
    return image.resize((width, height), how, (left * x, top * y, right, bottom))


def middle(scaled: tuple[int, int], height: int, width: int) -> tuple[int, int, int, int]:
    """The window (top, left, height, width) in the middle of a size."""
    return (scaled[0] - height) // 2, (scaled[1] - width) // 2, height, width


def cover_and_cut(image: Image.Image, height: int, width: int) -> Image.Image:
    """Scale (Lanczos) until the size is covered, then cut the middle: how training images meet an anchor size."""
    scaled = covering_size((image.height, image.width), (height, width))
    return scale_and_cut(image, scaled, middle(scaled, height, width), Image.Resampling.LANCZOS)


def contain_and_pad(image: Image.Image, height: int, width: int) -> Image.Image:
    """Scale (Lanczos) to fit inside the size, white around it: how images to be edited meet an anchor size."""
    rows, columns = contained_size((image.height, image.width), (height, width))
    return pad_around(image.resize((columns, rows), Image.Resampling.LANCZOS), height, width, (255, 255, 255))


def undo_contain_and_pad(image: Image.Image, height: int, width: int) -> Image.Image:
    """Cut the padding of an image that was height x width before `contain_and_pad`, and scale back to that size."""
    rows, columns = contained_size((height, width), (image.height, image.width))
    return cut_middle(image, rows, columns).resize((width, height), Image.Resampling.LANCZOS)


def name_images(images: Any) -> list[tuple[str, Any]]:
    """One or several PIL images or paths, not opened yet, each with the name that an error about it begins with."""
    several = isinstance(images, Sequence) and not isinstance(images, (str, bytes))
    items = list(images) if several else [images]
    require(len(items) > 0, "images", "at least one image", "none")
    named = []
    for index, item in enumerate(items):
        if isinstance(item, (str, os.PathLike)):
            named.append((f"image {Path(item)}", item))
        elif isinstance(item, Image.Image):
            named.append((f"images[{index}]" if len(items) > 1 else "image", item))
        else:
            fail("images", "a tensor [B, 3, H, W], PIL images or paths", type(item).__name__)
    return named


def open_image(item: Any, name: str = "image") -> Image.Image:
    """A PIL image or the path of one as upright RGB."""
    return upright_rgb(item, name) if isinstance(item, Image.Image) else read_image(item)


def run_ahead(
    work: Callable[[Item], Result], items: Iterable[Item], workers: int
) -> Iterator[tuple[int, Result | ValueError]]:
    """(index, result) of every item, in order; a ValueError that was raised stands in place of its result.

    workers: threads that work ahead, up to `AHEAD` items each; decoders of images release Python's lock. 0: none.
    """

    def guarded(item: Item) -> Result | ValueError:
        try:
            return work(item)
        except ValueError as error:
            return error

    if workers <= 0:
        yield from enumerate(map(guarded, items))
        return
    with ThreadPoolExecutor(workers, "tokenizers_mm read ahead") as pool:
        waiting: deque[Future[Result | ValueError]] = deque()
        done = 0
        try:
            for item in items:
                waiting.append(pool.submit(guarded, item))
                if len(waiting) > AHEAD * workers:
                    yield done, waiting.popleft().result()
                    done += 1
            while waiting:
                yield done, waiting.popleft().result()
                done += 1
        finally:
            pool.shutdown(cancel_futures=True)


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
