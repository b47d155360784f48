"""The abstract image tokenizer: all that training, evaluation, export and language models know of a model."""

import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import wraps
from typing import Any, ClassVar, Generic, cast, overload

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from tokenizers_mm._ahead import run_ahead
from tokenizers_mm._check import fail, naming, require
from tokenizers_mm._images import (
    Fit,
    check_images,
    fit_image,
    fit_multiple,
    image_levels,
    image_to_tensor,
    levels_to_tensor,
    name_images,
    open_image,
)
from tokenizers_mm.config import checked
from tokenizers_mm.models import saving
from tokenizers_mm.models.convenience import Convenience, OneImage
from tokenizers_mm.models.convenience import ImageInput as ImageInput
from tokenizers_mm.models.convenience import from_images as from_images
from tokenizers_mm.models.stable import Stability, stable_encoder
from tokenizers_mm.quantizers.base import Quantizer
from tokenizers_mm.types import (
    UNDISTURBED,
    Codes,
    Disturbance,
    ImageCodes,
    ImageLatents,
    Reconstruction,
    Stream,
    join_codes,
)

BATCH_PIXELS = {"cpu": 1 << 18, "cuda": 1 << 21}
"""Target pixels per batch by device type, at least one image: the small tokenizers of the package take 0.7 of the time
of batches of an eighth, and larger ones are not faster."""

WAITING_BATCHES = 8
"""Limit of the images that wait for others of their size, in batches."""


@dataclass(frozen=True)
class Provenance:
    """Origin of the weights: kept in config.json and printed on the model card."""

    source: str = ""
    license: str = ""
    sha256: str = ""
    notice: str = ""


def within_memory(build: Callable[[Any, Any], Any]) -> Callable[[Any, Any], Any]:
    """Decorate a `from_config`: check the configuration, and that its weights fit into memory, before any is taken.

    The size is that of the model on the meta device, where tensors have shapes and no values.
    """

    @wraps(build)
    def run(cls: Any, config: Any) -> Any:
        config = checked(config)
        if torch.get_default_device().type != "meta":
            with torch.device("meta"):
                tensors = [*(model := build(cls, config)).parameters(), *model.buffers()]
            needed = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
            memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
            require(needed <= memory, "config", f"weights within the {memory:,} bytes of this machine", f"{needed:,}")
        return build(cls, config)

    return run


class ImageTokenizer(Convenience, nn.Module, ABC, Generic[Codes]):
    """An image tokenizer: images to ids (or latents) and back.

    A family gives `family`, `Config`, `from_config` and the abstract methods. Images are float [B, 3, H, W] in [-1, 1].
    """

    family: ClassVar[str]
    Config: ClassVar[type]
    DISTURBANCES: ClassVar[frozenset[str]] = frozenset()
    """Fields of `Disturbance` that `reconstruct` honours; it refuses the others."""

    ONLY_DECODE: ClassVar[frozenset[str]] = frozenset()
    """Names of the children that encoding does not need; `models.stable` makes no float64 copy of them."""

    config: Any
    provenance: Provenance = Provenance()

    @classmethod
    @abstractmethod
    def from_config(cls, config: Any) -> "ImageTokenizer[Codes]":
        """Build the parts and the tokenizer with random weights; nothing is downloaded."""

    @property
    @abstractmethod
    def image_size(self) -> tuple[int, int] | None:
        """The one (height, width) that `encode` takes, or None where any multiple of `size_multiple` will do."""

    @property
    @abstractmethod
    def size_multiple(self) -> int:
        """Heights and widths must be multiples of this."""

    @abstractmethod
    def streams(self, height: int, width: int) -> tuple[Stream, ...]:
        """The streams of ids of an image of this size; empty for a continuous tokenizer."""

    @abstractmethod
    def encode_tensor(self, x: Tensor) -> Codes:
        """`encode` for a checked tensor [B, 3, H, W] on the tokenizer's device."""

    @abstractmethod
    def decode(self, codes: Codes) -> Tensor:
        """Images float [B, 3, H, W], not clamped; differentiable where the model is."""

    @abstractmethod
    def vectors(self, codes: Codes) -> Tensor:
        """Quantized vectors [B, h, w, D] on the decoder's grid; differentiable where the model is."""

    @abstractmethod
    def features(self, images_or_codes: Any) -> Tensor:
        """[B, T, C]: what a language model reads for understanding."""

    @abstractmethod
    def reconstruct(
        self, images: ImageInput, disturbance: Disturbance = UNDISTURBED, fit: Fit = "refuse"
    ) -> Reconstruction:
        """Encode, quantize and decode in one pass.

        images: a tensor [B, 3, H, W], through which gradients flow (the forward pass of training); or what `encode`
        takes, all of one size, with `fit` as there and without gradients. A family decorates it with `from_images`.
        """

    @abstractmethod
    def quantizers(self) -> Mapping[str, Quantizer]:
        """Quantizers by the name of their stream, as in `Reconstruction.quantized`; empty for a continuous model."""

    @property
    @abstractmethod
    def last_layer(self) -> nn.Parameter:
        """Weight of the last layer before the image, where gradient norms of loss terms are compared."""

    @property
    def loss_terms(self) -> frozenset[str]:
        """Names of the loss terms that a `Reconstruction` of this model supports.

        "pixel" always; "semantic" with a semantic decoder, "target" with a frozen tower; and the `loss_terms` of the
        quantizers.
        """
        return frozenset(["pixel"])

    @overload
    def encode(self, images: Tensor | OneImage, fit: Fit = "refuse", *, stable: bool = False) -> Codes: ...

    @overload
    def encode(self, images: ImageInput, fit: Fit = "refuse", *, stable: bool = False) -> Codes | Any: ...

    @torch.no_grad()
    def encode(self, images: ImageInput, fit: Fit = "refuse", *, stable: bool = False) -> Codes | list[Codes]:
        """Images to codes (latents for a continuous tokenizer).

        images: a tensor [B, 3, H, W] in [-1, 1], or PIL image(s), or path(s), which are opened a few at a time. Those
        of one size come back as one batch; images of several sizes, where the tokenizer takes them, as the list that
        `encode_each` returns (`Codes | Any` to a type checker, which cannot know the sizes of a list of images).
        fit: for PIL images and paths of another size than the tokenizer takes: "refuse" (an error), "crop", "pad" or
        "resize" (see `fit_picture`).
        stable: ids that depend on the image and the weights only, not on batch, threads, machine or dtype, with
        margins (see `models.stable`; `stability` tells what was done). ValueError for a tokenizer that cannot promise
        it.
        """
        if isinstance(images, Tensor):
            if stable:
                return cast(Codes, stable_encoder(self).encode(self._checked(images)))
            return self._encode_prepared(images)
        each = self.encode_each(images, fit, stable=stable)
        if len({(codes.height, codes.width) for codes in each}) == 1:
            return cast(Codes, join_codes(cast(Any, each)))
        return each

    def encode_each(self, images: ImageInput, fit: Fit = "refuse", *, stable: bool = False) -> list[Codes]:
        """Codes of every image by itself, in order; images of one size go through the networks together."""
        return _in_order(self.encode_batches(images, fit, stable=stable))

    def encode_batches(
        self,
        images: ImageInput | Iterator[tuple[str, Any]],
        fit: Fit = "refuse",
        refused: Callable[[int, ValueError], None] | None = None,
        *,
        stable: bool = False,
        batch_size: int | None = None,
        workers: int = 0,
    ) -> Iterator[tuple[list[int], Codes]]:
        """Batches of images of one size, as (positions in `images`, codes), with few images in memory at a time.

        images: as for `encode`, no tensor; or an iterator of pairs: the name that an error about an image begins with,
        and the image, its path, or a function that gives it.
        refused: called with the position and the error of an image that cannot be read or is of a wrong size; by
        default the error is raised. batch_size: images of a batch; by default it holds up to `BATCH_PIXELS` pixels.
        workers: threads that read images ahead. stable: as for `encode`.
        """

        def open_fitted(pair: tuple[str, Any]) -> np.ndarray:
            name, item = pair
            return image_levels(self._open_fitted(item() if callable(item) else item, fit, name))

        require(batch_size is None or batch_size > 0, "batch_size", "at least 1", batch_size)
        require(workers >= 0, "workers", "0 or more threads", workers)
        pairs = images if isinstance(images, Iterator) else name_images(images)
        groups = _grouped(run_ahead(open_fitted, pairs, workers), refused, self._batch_pixels(), batch_size)
        batches = ((list(numbers), levels_to_tensor(found)) for numbers, found in groups)
        if stable:
            checked = ((numbers, self._checked(x)) for numbers, x in batches)
            encoded = stable_encoder(self).encode_many(checked, self._batch_pixels())
            yield from cast("Iterator[tuple[list[int], Codes]]", encoded)
            return
        for numbers, x in batches:
            yield numbers, self._encode_prepared(x)

    @torch.no_grad()
    def _encode_prepared(self, images: Tensor) -> Codes:
        return self.encode_tensor(self.prepare(images))

    def _batch_pixels(self) -> int:
        return BATCH_PIXELS.get(self.device.type, BATCH_PIXELS["cuda"])

    def _checked(self, images: Tensor) -> Tensor:
        """A tensor of images [B, 3, H, W] on the tokenizer's device, in its own dtype."""
        check_images(images)
        height, width = images.shape[-2:]
        self.check_size(height, width)
        return images.to(self.device)

    @property
    def stability(self) -> Stability:
        """Report of what `encode(..., stable=True)` did with this tokenizer so far."""
        return stable_encoder(self).report

    def as_codes(self, images_or_codes: Any) -> Codes:
        """Codes as they are, with ids [B, L] or values [B, L, D]; images [B, 3, H, W], or what `encode` takes, encoded.

        Raises: ValueError for images of several sizes.
        """
        if isinstance(images_or_codes, (ImageCodes, ImageLatents)):
            return cast(Codes, images_or_codes)
        codes = self.encode(images_or_codes)
        if isinstance(codes, list):
            fail("images", "images of one size", f"sizes {sorted({(each.height, each.width) for each in codes})}")
        return cast(Codes, codes)

    def prepare(self, images: ImageInput, fit: Fit = "refuse") -> Tensor:
        """Images of one size as a float tensor [B, 3, H, W] in [-1, 1] on the tokenizer's device, or ValueError."""
        if not isinstance(images, Tensor):
            pictures = [self._open_fitted(item, fit, name) for name, item in name_images(images)]
            sizes = sorted({(picture.height, picture.width) for picture in pictures})
            require(len(sizes) == 1, "images", "images of one size", f"sizes {sizes}")
            images = torch.stack([image_to_tensor(picture) for picture in pictures])
        return self._checked(images).to(self.dtype)

    def prepared_parts(self, images: ImageInput, fit: Fit = "refuse") -> Iterator[Tensor]:
        """Result of `prepare`, in parts: a tensor whole; of PIL images and paths a few at a time, opened when due."""
        if isinstance(images, Tensor):
            yield self.prepare(images)
            return
        named = name_images(images)
        while named:
            first = self.prepare(named[0][1], fit)
            count = max(1, self._batch_pixels() // first[0, 0].numel())
            rest = [item for _, item in named[1:count]]
            yield torch.cat([first, self.prepare(rest, fit)]) if rest else first
            named = named[count:]

    def _open_fitted(self, item: Any, fit: Fit, name: str) -> Image.Image:
        """A PIL image, or the image of a path, of a size that `encode` takes; ValueError that names it otherwise."""
        with naming(name):
            image = self.fit_picture(open_image(item, name), fit)
        self.check_size(image.height, image.width, name, " (or choose a fit: crop, pad or resize)")
        return image

    def fit_picture(self, picture: Image.Image, fit: Fit) -> Image.Image:
        """A picture brought to a size that `encode` takes; with "refuse", as it is, for `check_size` to judge.

        Where one size is taken, "crop" and "pad" scale the picture until it covers or fits that size. Where any
        multiple is taken, nothing is scaled: "crop" cuts the middle, "pad" adds grey. "resize" scales in both cases.
        """
        if fit == "refuse":
            return picture
        if self.image_size is not None:
            return fit_image(picture, *self.image_size, fit)
        return fit_multiple(picture, self.size_multiple, fit)

    def check_size(self, height: int, width: int, name: str = "images", advice: str = "") -> None:
        """Refuse a size that `encode` does not take, with an error that begins with `name` and ends with `advice`."""
        got = f"{height} x {width}{advice}"
        if self.image_size is not None and (height, width) != self.image_size:
            fail(name, f"{self.image_size[0]} x {self.image_size[1]} pixels", got)
        multiple = self.size_multiple
        if height < multiple or width < multiple or height % multiple or width % multiple:
            fail(name, f"height and width that are multiples of {multiple}", got)

    @torch.no_grad()
    def decode_ids(self, ids: Any, height: int | None = None, width: int | None = None) -> Tensor:
        """Images float [B, 3, H, W] from plain ids [B, L], integers of any kind (a tensor, a numpy array, lists).

        height and width may be left out where the tokenizer takes one size. No gradients: `decode` has them.

        Raises: ValueError for ids that are not of the streams of this size.
        """
        height, width = self.own_size(height, width)
        streams = self.streams(height, width)
        require(len(streams) > 0, "ids", "latents (this tokenizer is continuous)", ids)
        return self.decode(cast(Codes, ImageCodes(ids, height, width, streams).to(self.device)))

    @property
    def device(self) -> torch.device:
        """Device of the weights."""
        return next(self.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the weights."""
        return next(self.parameters()).dtype

    def save(self, directory: str | os.PathLike[str]) -> None:
        """Write config.json, model.safetensors, preprocessor_config.json and README.md, atomically."""
        saving.write(self, directory)

    def fingerprint(self) -> str:
        """`FAMILY:DIGEST` of configuration and weights, the name of this tokenizer in files of ids.

        The same for copies in float64, float32 and bfloat16, on whatever device.
        """
        return saving.fingerprint(self)


def _grouped(
    opened: Iterable[tuple[int, np.ndarray | ValueError]],
    refused: Callable[[int, ValueError], None] | None,
    limit: int,
    batch_size: int | None,
) -> Iterator[tuple[tuple[int, ...], tuple[np.ndarray, ...]]]:
    """Positions and images [H, W, 3], all of one size, as they become enough for a batch. limit: pixels of a batch."""
    waiting: dict[tuple[int, ...], list[tuple[int, np.ndarray]]] = {}
    held = 0  # pixels
    for index, image in opened:
        if isinstance(image, ValueError):
            if refused is None:
                raise image
            refused(index, image)
            continue
        shape = image.shape[:2]
        waiting.setdefault(shape, []).append((index, image))
        pixels = shape[0] * shape[1]
        held += pixels
        most = limit if batch_size is None else batch_size * pixels
        ready = None
        if (len(waiting[shape]) + 1) * pixels > most:
            ready = shape
        elif held > WAITING_BATCHES * max(limit, most):
            ready = max(waiting, key=lambda size: size[0] * size[1] * len(waiting[size]))
        if ready is not None:
            numbers, images = zip(*waiting.pop(ready), strict=True)
            held -= ready[0] * ready[1] * len(images)
            yield numbers, images
    for members in waiting.values():
        numbers, images = zip(*members, strict=True)
        yield numbers, images


def _in_order(parts: Iterable[tuple[list[int], Codes]]) -> list[Codes]:
    """Codes of one image each, by position."""
    found = {index: codes for indices, batch in parts for index, codes in zip(indices, batch.unbind(), strict=True)}
    return cast("list[Codes]", [found[index] for index in sorted(found)])
