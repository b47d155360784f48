"""Emu3's vision tokenizer (arXiv 2409.18869) for images: a video tokenizer, its temporal layers folded for one image.

What a still image does not use (other taps of convolutions over time) is not kept: the tokenizer cannot be written back
to its names, and it takes no videos.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from tokenizers_mm.checkpoints.cnn import read_vqgan, shape_of, taming_rules
from tokenizers_mm.checkpoints.family import Checkpoint, Family, check_description
from tokenizers_mm.checkpoints.upstream import Link, Rule, Shape, within
from tokenizers_mm.models import Provenance
from tokenizers_mm.models.vqgan import VQGAN
from tokenizers_mm.quantizers import VQConfig

SOURCE = Provenance(source="BAAI/Emu3-VisionTokenizer on the Hugging Face hub", license="Apache-2.0")
CODES = "quantize.embedding.weight"
PREFIX = "model.vqmodel."
"""Prefix of the tokenizer's tensors in a file of the whole model in transformers."""

_TIME: list[Rule] = [
    (r"^encoder\.still\.first\.", "encoder.time_conv.0.conv.conv."),
    (r"^encoder\.still\.second\.", "encoder.time_conv.1.conv.conv."),
    (r"^decoder\.still\.convolutions\.", "decoder.time_conv."),
    (r"^(decoder\.time_conv\.\d+)\.", r"\1.conv.conv."),
    (r"^(en|de)coder\.still\.blocks\.(.*)\.conv(\d)\.", r"\1coder.time_res_stack.\2.conv\3.conv."),
    (r"^(en|de)coder\.still\.blocks\.", r"\1coder.time_res_stack."),
    (r"^head\.", "quant_conv.conv."),
    (r"^embed\.", "post_quant_conv.conv."),
]
_NORMS: list[Rule] = [
    (r"^(decoder\..*norm\w*)\.norm\.", r"\1.norm_layer."),
    (r"^(decoder\..*)\.scale\.", r"\1.conv_y."),
    (r"^(decoder\..*)\.shift\.", r"\1.conv_b."),
]
_TRANSFORMERS: list[Rule] = [
    (r"^encoder\.down\.", "encoder.down_block.down."),
    (r"^decoder\.up\.", "decoder.up_block.up."),
    (r"\.mid\.attn_1\.norm\.", ".middle_block.attn_norm."),
    (r"\.mid\.", ".middle_block."),
    (r"\.attn\.(\d+)\.norm\.", r".attn_norms.\1."),
    (r"\.(attn\.\d+|attn_1)\.([qkv])\.", r".\1.\2_proj."),
    (r"\.(attn\.\d+|attn_1)\.proj_out\.", r".\1.out_proj."),
]


def rules_of(levels: int) -> list[Rule]:
    """Rules from our names to the published ones."""
    return [(r"^quantizer\.codes$", CODES), *_TIME, *taming_rules(levels), *_NORMS]


def transformers_rules_of(levels: int) -> list[Rule]:
    """Rules from our names to those of transformers."""
    return [*rules_of(levels), *_TRANSFORMERS]


def convert(tensors: Mapping[str, Tensor], where: str, config: Mapping[str, Any] | None = None) -> VQGAN:
    """A tokenizer of images from tensors with the published names, or those of transformers."""
    tensors = within(tensors, (PREFIX,))
    codes, dim = shape_of(tensors, CODES, where)
    theirs = any(name.startswith("encoder.down_block.") for name in tensors)
    rules = transformers_rules_of if theirs else rules_of
    tokenizer = read_vqgan(tensors, where, rules, VQConfig(codes, dim), adjust=folded)
    check_description(config, {"codebook_size": codes, "embed_dim": dim})
    tokenizer.provenance = replace(SOURCE, notice="For images only: the layers over time are folded.")
    return tokenizer


def folded(item: Link) -> Link:
    """The link of a tensor that is made of a convolution over time, or of a linear map there."""
    name, shape = str(item.theirs[0]), item.shape
    if name.endswith("_proj.weight"):
        return replace(item, their_shape=shape[:2])
    for pattern, published, change in _FOLDS:
        if (len(shape) != 1 or change is _twice) and re.search(pattern, item.ours):
            return replace(item, their_shape=published(shape), change=change)
    return item


def _two_frames(weight: Tensor) -> Tensor:
    """[C, C, 4, 3, 3] -> [2C, C, 3, 3]: the first frame out sees the image in its last two taps, the second in all."""
    return torch.cat([weight[:, :, 2:].sum(2), weight.sum(2)])


def _twice(bias: Tensor) -> Tensor:
    return torch.cat([bias, bias])


def _both_frames(weight: Tensor) -> Tensor:
    """[C, C, 4, 3, 3] -> [C, 2C, 3, 3]: the last two taps see the two frames, those before see zeros."""
    return torch.cat([weight[:, :, 2], weight[:, :, 3]], dim=1)


def _last_tap(weight: Tensor) -> Tensor:
    """[O, I, 3, ...] -> [O, I, ...]: the taps before see zeros."""
    return weight[:, :, 2]


_FOLDS: list[tuple[str, Callable[[Shape], Shape], Callable[[Tensor], Tensor]]] = [
    (r"^encoder\.still\.first\.weight$", lambda ours: (ours[0] // 2, ours[1], 4, *ours[2:]), _two_frames),
    (r"^encoder\.still\.first\.bias$", lambda ours: (ours[0] // 2,), _twice),
    (r"^encoder\.still\.second\.weight$", lambda ours: (ours[0], ours[1] // 2, 4, *ours[2:]), _both_frames),
    (r"^(?:(?:en|de)coder\.still\..*|head|embed)\.weight$", lambda ours: (*ours[:2], 3, *ours[2:]), _last_tap),
]
"""Our names, the published shape from ours, and what makes our tensor."""

_SHOWN = (
    "transformers' class and the original code at small sizes: ids and pixels; "
    "names, shapes and memory of the full size (of the original's)"
)

FAMILY = Family(
    convert,
    (
        Checkpoint(
            "BAAI/Emu3-VisionTokenizer: model.safetensors", (512, 512), ((4096, 1 << 15),), "Apache-2.0", _SHOWN
        ),
        Checkpoint("BAAI/Emu3-Chat-hf (model.vqmodel.*)", (512, 512), ((4096, 1 << 15),), "Apache-2.0", _SHOWN),
    ),
    prefixes=(PREFIX,),
)
