"""Protocols of evaluation as data: what is done to an image before, and to a reconstruction after, a tokenizer.

Two reports may be compared where the hashes of their protocols are equal.
"""

import hashlib
import json
from dataclasses import asdict, dataclass, fields, replace
from typing import Literal

import torch
from PIL import Image
from torch import Tensor

from tokenizers_mm._check import fail, finite_extremes, require
from tokenizers_mm._images import Fit, fit_image, fit_multiple, to_bytes
from tokenizers_mm.data.transforms import center_crop
from tokenizers_mm.eval.image import Window


@dataclass(frozen=True)
class Protocol:
    """Preparation of images and judgement of reconstructions. Colours are sRGB, 8 bits, mapped to [0, 1] by metrics.

    name: of the protocol; not part of the hash.
    reference: the images it is meant for, in words; the digest of those that were used stands in the report.
    fit: "adm" (halve by box, scale by bicubic, cut the middle: the crop of ADM), or "crop", "pad", "resize" and
        "refuse" as in `tokenizer.encode`.
    size: side of the square that all tokenizers get; 0 stands for the size of the first that takes only one, else for
         each image's own, brought to the multiple that all tokenizers take.
    other_size: for a tokenizer that takes only another size: "refuse", or "bicubic" scaling to it and back.
    rounding: of reconstructions: "nearest" (8 bits, as a file has them) or "none".
    truth_of_sets: originals of distances between sets: "exact", or "truncated", one lower where a cast to integers cut
        the value that floating point had left just below.
    ssim, ssim_range: window and data range of SSIM, for images in [0, 1]; a range of 2 makes values higher.
    """

    name: str
    reference: str
    fit: Literal["adm", "crop", "pad", "resize", "refuse"] = "crop"
    size: int = 0
    other_size: Literal["refuse", "bicubic"] = "refuse"
    rounding: Literal["nearest", "none"] = "nearest"
    truth_of_sets: Literal["exact", "truncated"] = "exact"
    ssim: Window = "gaussian"
    ssim_range: float = 1.0

    @property
    def hash(self) -> str:
        """SHA-256 of every field but the name, 16 hexadecimal digits."""
        data = {key: value for key, value in asdict(self).items() if key != "name"}
        return hashlib.sha256(json.dumps(data, sort_keys=True).encode()).hexdigest()[:16]

    def prepare(self, image: Image.Image, size: tuple[int, int] | None, multiple: int) -> Image.Image:
        """An image as all tokenizers get it. size: (height, width) of all images, None for each one's own."""
        if size is None:
            require(self.fit != "adm", "protocol", "a size for the crop of ADM", "none")
            return fit_multiple(image, multiple, self.fit)  # type: ignore[arg-type]
        if self.fit == "adm":
            require(size[0] == size[1], "size", "a square for the crop of ADM", size)
            return center_crop(image, size[0])
        return fit_image(image, *size, self.fit)

    def finish(self, x: Tensor, name: str = "reconstruction") -> Tensor:
        """A reconstruction in [-1, 1] as metrics see it; refused, by its name, where it is not finite."""
        finite_extremes(x, name)
        return round_to_bytes(x) if self.rounding == "nearest" else x.float().clamp(-1, 1)

    def reference_of_sets(self, x: Tensor) -> Tensor:
        """Originals in [-1, 1] as distances between sets see them."""
        return truncate_to_bytes(x) if self.truth_of_sets == "truncated" else x


def round_to_bytes(x: Tensor) -> Tensor:
    """Values in [-1, 1] rounded as `tensor_to_images` does for a file; those outside are clamped."""
    return to_bytes(x, torch.float32).div_(127.5).sub_(1)


def truncate_to_bytes(x: Tensor) -> Tensor:
    """Values in [-1, 1] cut, not rounded, to 8 bits after a way through [0, 1] in float32."""
    return (x * 0.5 + 0.5).mul(255).to(torch.uint8).float().div(127.5).sub(1)


IMAGENET = "ImageNet-1k validation, 50,000 images"

_ALL = (
    Protocol("default", "any images"),
    Protocol("imagenet-val-256", IMAGENET, "adm", 256),
    Protocol("imagenet-val-384", IMAGENET, "adm", 384),
    Protocol("coco-val-256", "COCO 2017 validation, 5,000 images", "adm", 256),
    Protocol("native", "any images, at their own sizes", "crop"),
    Protocol("paper:tokenflow", IMAGENET, "adm", truth_of_sets="truncated", ssim="uniform7", ssim_range=2.0),
    Protocol("paper:dualvitok", IMAGENET, "adm", 256, ssim="uniform7", ssim_range=2.0),
    Protocol("paper:llamagen", IMAGENET, "adm", 256, "bicubic", ssim="uniform7", ssim_range=2.0),
)

PROTOCOLS: dict[str, Protocol] = {protocol.name: protocol for protocol in _ALL}
"""Protocols by name. Those of papers repeat what the released evaluation code does, its faults included: SSIM with a
uniform window and the range 2 for images in [0, 1], which makes it 0.01 to 0.1 higher; TokenFlow's truth for rFID is
cut to bytes, not rounded. `paper:tokenflow` has the size of its tokenizer (224, 256 or 384). LlamaGen's 384 and 512
models are judged at 256. rFID of the papers had other reference files, which no protocol can repeat."""


def protocol_by_name(name: str, fit: Fit | None = None, size: int | None = None) -> Protocol:
    """A protocol, with `fit` and `size` in place of its own where they are given: then its hash is another too."""
    if name not in PROTOCOLS:
        fail("protocol", f"one of {', '.join(PROTOCOLS)}", repr(name))
    found = PROTOCOLS[name]
    require(size is None or 0 <= size <= 1 << 14, "size", f"0 to {1 << 14} pixels", size)
    changes = {key: value for key, value in (("fit", fit), ("size", size)) if value is not None}
    changes = {key: value for key, value in changes.items() if getattr(found, key) != value}
    if not changes:
        return found
    return replace(found, name=" ".join([name, *(f"{k}={v}" for k, v in changes.items())]), **changes)  # type: ignore[arg-type]


def differences(a: Protocol, b: Protocol) -> list[str]:
    """Fields in which two protocols differ, with both values."""
    names = [field.name for field in fields(Protocol) if field.name != "name"]
    return [f"{n}: {getattr(a, n)} / {getattr(b, n)}" for n in names if getattr(a, n) != getattr(b, n)]
