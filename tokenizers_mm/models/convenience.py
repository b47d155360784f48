"""Methods of every tokenizer for people: names known from Hugging Face, images to look at, short forms.

They are written with the methods of `ImageTokenizer` alone; a family gives none of them.
"""

import os
from collections.abc import Callable, Sequence
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias, TypeVar, cast

import torch
from PIL import Image
from torch import Tensor, nn

from tokenizers_mm._check import fail, require
from tokenizers_mm._display import comparison_grid, table
from tokenizers_mm._images import Fit, tensor_to_images
from tokenizers_mm.types import UNDISTURBED, Disturbance, ImageCodes, ImageLatents, Reconstruction

if TYPE_CHECKING:
    from tokenizers_mm.models.base import ImageTokenizer

OneImage: TypeAlias = Image.Image | str | os.PathLike[str]
"""A PIL image, or the path of an image file."""

ImageInput: TypeAlias = Tensor | OneImage | Sequence[Image.Image] | Sequence[str] | Sequence[os.PathLike[str]]
"""A tensor [B, 3, H, W] in [-1, 1], a PIL image, a path, or a list of images or paths."""

Family = TypeVar("Family", bound="Convenience")


def from_images(reconstruct: Callable[..., Reconstruction]) -> Callable[..., Reconstruction]:
    """Decorate a family's `reconstruct`, which takes a tensor, so that it takes images of every kind."""

    @wraps(reconstruct)
    def run(
        self: Any, images: ImageInput, disturbance: Disturbance = UNDISTURBED, fit: Fit = "refuse"
    ) -> Reconstruction:
        if isinstance(images, Tensor):
            return reconstruct(self, images, disturbance)
        with torch.no_grad():
            return reconstruct(self, self.prepare(images, fit), disturbance)

    return run


class Convenience:
    """Methods of `ImageTokenizer` that are short forms of others."""

    @torch.no_grad()
    def to_pil(self, x: Tensor | ImageCodes | ImageLatents) -> list[Image.Image]:
        """PIL images of float [B, 3, H, W] in [-1, 1], clamped; or of codes, which are decoded without gradients."""
        return tensor_to_images(x if isinstance(x, Tensor) else _self(self).decode(x.to(_self(self).device)))

    @torch.no_grad()
    def show(self, images: ImageInput, fit: Fit = "crop", zoom: int = 1) -> Image.Image:
        """One image of originals over their reconstructions, which a notebook displays.

        images, fit: as for `encode`; all of one size after `fit`. zoom: pixels shown per pixel.
        """
        x = _self(self).prepare(images, fit)
        decoded = _self(self).decode(_self(self).encode_tensor(x))
        return comparison_grid(x.float().cpu(), decoded.float().cpu(), min(8, len(x)), zoom)

    @property
    def codebook_size(self) -> int:
        """Codes of all streams together: rows that a language model needs for them. 0 for a continuous tokenizer."""
        return sum(quantizer.codebook_size * quantizer.groups for quantizer in _self(self).quantizers().values())

    def num_ids(self, height: int | None = None, width: int | None = None) -> int:
        """Ids of one image; the size may be left out where the tokenizer takes one. 0 for a continuous tokenizer."""
        return sum(stream.num_ids for stream in _self(self).streams(*self.own_size(height, width)))

    def own_size(self, height: int | None = None, width: int | None = None) -> tuple[int, int]:
        """A size that `encode` takes, checked; the one of the tokenizer where a side is None."""
        own = _self(self).image_size
        if height is None or width is None:
            if own is None:
                fail("height and width", "the size of the image", "None")
            height, width = own
        _self(self).check_size(height, width)
        return height, width

    @classmethod
    def from_pretrained(
        cls: type[Family],
        source: str | os.PathLike[str],
        revision: str | None = None,
        device: torch.device | str | None = None,
    ) -> Family:
        """`tokenizers_mm.load`, with the type of this class: a directory, a hub id, or a shipped tokenizer.

        Raises: ValueError where the tokenizer is of another family.
        """
        from tokenizers_mm.models.loading import load  # which imports the families, and they this module

        tokenizer = load(source, revision, device)
        if not isinstance(tokenizer, cls):
            fail("source", f"a tokenizer of family {getattr(cls, 'family', cls.__name__)!r}", repr(tokenizer.family))
        return tokenizer

    def save_pretrained(
        self,
        save_directory: str | os.PathLike[str],
        *,
        push_to_hub: bool = False,
        repo_id: str | None = None,
        **options: Any,
    ) -> None:
        """`save` by the name that Hugging Face libraries use.

        push_to_hub: also upload, to `repo_id` (by default the name of the directory), with options of `push_to_hub`.
        """
        require(push_to_hub or not options, "options", "none without push_to_hub", sorted(options))
        _self(self).save(save_directory)
        if push_to_hub:
            self.push_to_hub(repo_id or Path(os.path.realpath(save_directory)).name, **options)

    def push_to_hub(self, repo_id: str, private: bool | None = None, **options: Any) -> str:
        """Upload the files of `save` through huggingface_hub as one commit; returns its address.

        options: those of `models.publishing.push`: a report of `eval` for the card, `revision`, `token` and others.
        """
        from tokenizers_mm.models.publishing import push  # network code: loaded when asked for

        return push(_self(self), repo_id, private=private, **options)

    def __repr__(self) -> str:
        """One line; `torch.nn.Module.__repr__(tokenizer)` has the tree of modules."""
        parts = [f"{name.partition('stream ')[2]} {text}".strip() for name, text in facts(_self(self)).items()]
        return f"{type(self).__name__}({', '.join(parts)})"

    def _repr_html_(self) -> str:
        parts = {name: f"{_millions(part)} parameters" for name, part in _self(self).named_children()}
        return table(f"{type(self).__name__} image tokenizer", {**facts(_self(self)), **parts})


def facts(tokenizer: "ImageTokenizer[Any]") -> dict[str, str]:
    """Short texts that say what a tokenizer is, by name."""
    size = tokenizer.image_size
    found = {"images": f"{size[0]}x{size[1]} pixels" if size else f"any multiple of {tokenizer.size_multiple} pixels"}
    for stream in tokenizer.streams(*size) if size else ():
        found[f"stream {stream.name}"] = f"{stream.num_ids} ids of {count_text(stream.codebook_size)} codes"
    for name, quantizer in tokenizer.quantizers().items() if size is None else ():
        several = f"{quantizer.groups} x " if quantizer.groups > 1 else ""
        found[f"stream {name}"] = f"{several}{count_text(quantizer.codebook_size)} codes"
    if len(found) == 1:
        found["streams"] = "continuous latents"
    place = f"{tokenizer.device} {str(tokenizer.dtype).removeprefix('torch.')}"
    return found | {"parameters": f"{_millions(tokenizer)} parameters", "weights": place}


def count_text(count: int) -> str:
    """A number of codes: with commas, or as a power of two where it is long."""
    return f"{count:,}" if count < 1 << 40 else f"2^{count.bit_length() - 1}"


def _self(tokenizer: Convenience) -> "ImageTokenizer[Any]":
    return cast("ImageTokenizer[Any]", tokenizer)


def _millions(module: nn.Module) -> str:
    return f"{sum(parameter.numel() for parameter in module.parameters()) / 1e6:.2f} M"
