"""Image codecs as baselines: JPEG, WebP, AVIF and JPEG XL through Pillow, at a quality or at a number of bits.

Bits are those of the payload: the compressed samples without container, and for JPEG without its tables, which are the
standard ones and follow from the quality (8 bits). So small images are not judged by the size of a file's header.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from io import BytesIO
from typing import Any

import PIL
from PIL import Image, features
from torch import Tensor

from tokenizers_mm._check import fail, require
from tokenizers_mm._images import image_to_tensor, tensor_to_images

CODECS = ("jpeg", "webp", "avif", "jxl")
"""Names of codecs; `jxl` needs the package pillow-jxl-plugin."""

CURVES = {
    "jpeg": (3, 6, 12, 25, 50, 75, 90),
    "webp": (0, 5, 15, 30, 50, 75, 90),
    "avif": (5, 15, 30, 45, 60, 75, 90),
    "jxl": (5, 15, 30, 45, 60, 75, 90),
}
"""Qualities of a codec's curve of bits against distortion."""

QUALITIES = {"jpeg": (1, 95), "webp": (0, 100), "avif": (0, 100), "jxl": (1, 99)}

OPTIONS: dict[str, dict[str, Any]] = {"jpeg": {}, "webp": {"method": 6}, "avif": {"speed": 4}, "jxl": {}}
"""Options of Pillow's writers besides the quality."""


@dataclass(frozen=True)
class Codec:
    """A codec and one way to choose its quality: `quality`, `bits` of an image, `per_pixel`; none of them: matched."""

    format: str
    quality: int | None = None
    bits: float | None = None
    per_pixel: float | None = None

    @classmethod
    def parse(cls, name: str, option: str) -> "Codec":
        """`match`, `q75` (quality), `2000b` (bits of an image) or `0.25bpp` (bits per pixel)."""
        _check_available(name)
        number = re.fullmatch(r"(?:q(\d+)|(\d+(?:\.\d+)?)(b|bpp))", option)
        if option == "match":
            return cls(name)
        if number is None:
            fail(f"{name}@{option}", f"{name}@match, @curve, @q75, @2000b or @0.25bpp", option)
        if number[1]:
            low, high = QUALITIES[name]
            require(low <= int(number[1]) <= high, f"{name}@{option}", f"a quality from {low} to {high}", number[1])
            return cls(name, quality=int(number[1]))
        value = float(number[2])
        return cls(name, bits=value) if number[3] == "b" else cls(name, per_pixel=value)

    @property
    def match(self) -> bool:
        """True if it needs the bits of a tokenizer."""
        return self.quality is None and self.bits is None and self.per_pixel is None

    @property
    def name(self) -> str:
        """Label in tables."""
        if self.quality is not None:
            return f"{self.format} q{self.quality}"
        if self.bits is not None:
            return f"{self.format} {self.bits:g} bit"
        return f"{self.format} at equal bits" if self.match else f"{self.format} {self.per_pixel:g} bpp"

    @property
    def version(self) -> str:
        """Version of the encoder."""
        name = {"jpeg": "libjpeg_turbo", "webp": "webp", "avif": "avif"}.get(self.format, "")
        known = {*features.modules, *features.codecs, *features.features}
        own = features.version(name) if name in known else ""
        return f"Pillow {PIL.__version__}, {self.format} {own or 'unknown'}"

    def targets(self, x: Tensor, others: Sequence[float] | None) -> list[float | None]:
        """Bits that each image may have; None where the quality is given."""
        if self.match:
            require(others is not None and len(others) == len(x), self.name, "bits of a tokenizer", others)
            return list(others or ())
        each = self.bits if self.per_pixel is None else self.per_pixel * x.shape[-2] * x.shape[-1]
        return [each] * len(x)

    def compress(self, x: Tensor, bits: float | None) -> tuple[bytes, int]:
        """A file of the image [3, H, W] and the bits of its payload: the most that `bits` allow.

        Where even the lowest quality needs more, that one.
        """
        image = tensor_to_images(x[None])[0]
        if bits is None:
            assert self.quality is not None
            return self._write(image, self.quality)
        low, high = QUALITIES[self.format]
        best = self._write(image, low)
        while low < high:  # the size does not fall with the quality
            middle = (low + high + 1) // 2
            tried = self._write(image, middle)
            if tried[1] <= bits:
                low, best = middle, tried
            else:
                high = middle - 1
        return best

    def _write(self, image: Image.Image, quality: int) -> tuple[bytes, int]:
        stream = BytesIO()
        image.save(stream, format=self.format, quality=quality, **OPTIONS[self.format])
        data = stream.getvalue()
        return data, payload_bits(data, self.format)

    def decompress(self, data: bytes) -> Tensor:
        """The image [3, H, W] in [-1, 1] of a file that `compress` made."""
        with Image.open(BytesIO(data)) as image:
            return image_to_tensor(image.convert("RGB"))


def _check_available(name: str) -> None:
    """Refuse a codec that this Pillow does not write."""
    if name == "jxl":
        try:
            import pillow_jxl  # noqa: F401  # pyright: ignore[reportMissingImports]
        except ImportError:
            fail("jxl", "the package pillow-jxl-plugin to be installed", "no such package")
        return
    Image.init()
    require(name.upper() in Image.SAVE, name, "a Pillow that writes it", f"Pillow {PIL.__version__} without")


def payload_bits(data: bytes, kind: str) -> int:
    """Bits of the compressed samples of a file: JPEG's scan and 8 bits of quality, WebP's and AVIF's image data."""
    if kind == "jpeg":
        position = 2
        while data[position + 1] != 0xDA:  # segments up to the start of the scan
            position += 2 + int.from_bytes(data[position + 2 : position + 4], "big")
        start = position + 2 + int.from_bytes(data[position + 2 : position + 4], "big")
        return 8 * (len(data) - 2 - start) + 8
    if kind == "webp":
        return 8 * sum(size for name, size in _chunks(data, 12, little=True) if name in (b"VP8 ", b"VP8L", b"ALPH"))
    if kind == "avif":
        return 8 * sum(size for name, size in _chunks(data, 0, little=False) if name == b"mdat")
    return 8 * len(data)


def _chunks(data: bytes, position: int, little: bool) -> list[tuple[bytes, int]]:
    """(name, bytes inside) of the chunks of a RIFF file (little-endian) or the boxes of an ISO file."""
    found = []
    while position + 8 <= len(data):
        head = data[position : position + 8]
        if little:
            name, size = head[:4], int.from_bytes(head[4:], "little")
            position += 8 + size + size % 2
        else:
            name, whole = head[4:], int.from_bytes(head[:4], "big")
            whole = whole or len(data) - position  # zero: to the end of the file
            size = whole - 8
            position += max(8, whole)
        found.append((name, size))
    return found
