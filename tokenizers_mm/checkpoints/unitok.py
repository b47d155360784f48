"""UniTok's tokenizer (arXiv 2502.20321): ViTamin networks and eight codebooks of unit vectors side by side.

A trainer's file holds the weights under `trainer.unitok`. Its text encoder and its contrastive head, which give no
image, are not kept.
"""

import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from tokenizers_mm.checkpoints.cnn import shape_of, shapes_of
from tokenizers_mm.checkpoints.family import Checkpoint, Family, check_description
from tokenizers_mm.checkpoints.upstream import Link, Rule, Shape, link, take
from tokenizers_mm.config import checked
from tokenizers_mm.decoders.vitamin import ViTaminDecoderConfig
from tokenizers_mm.encoders.vitamin import ViTaminEncoderConfig
from tokenizers_mm.models import Provenance
from tokenizers_mm.models.loading import build, fill
from tokenizers_mm.models.vqgan import VQGAN, VQGANConfig
from tokenizers_mm.quantizers import MultiCodebookConfig, VQConfig

SOURCE = Provenance(source="FoundationVision/unitok_tokenizer on the Hugging Face hub", license="MIT")

HEAD_WIDTH = 64
"""Channels of an attention head of both published sizes of ViTamin."""

TEXT = "text_encoder."

_RULES: list[Rule] = [
    (r"^encoder\.(conv_in|conv_stem)\.", r"encoder.patch_embed.backbone.stem.\1."),
    (r"\.stem\.conv_in\.", ".stem.conv1."),
    (r"\.stem\.conv_stem\.", ".stem.conv2."),
    (r"^encoder\.norm_in\.", "encoder.patch_embed.backbone.stem.norm1."),
    (r"^encoder\.stages\.", "encoder.patch_embed.backbone.stages."),
    (r"^encoder\.norm_pool\.", "encoder.patch_embed.backbone.pool.norm."),
    (r"^encoder\.pool\.", "encoder.patch_embed.backbone.pool.proj."),
    (r"^encoder\.project\.", "quant_proj."),
    (r"^decoder\.project\.", "post_quant_proj."),
    (r"^decoder\.expand\.", "decoder.up_conv1."),
    (r"^decoder\.stages\.0\.", "decoder.up_conv2."),
    (r"^decoder\.stages\.1\.", "decoder.up_conv3."),
    (r"^decoder\.expand_last\.", "decoder.up_conv4.conv1."),
    (r"^decoder\.norm_out\.", "decoder.up_conv4.norm1."),
    (r"^decoder\.conv_out\.", "decoder.up_conv4.conv2."),
    (r"^((?:encoder\.patch_embed|decoder\.up_conv[23])\..*\d+)\.norm\.", r"\1.pre_norm."),
    (r"\.widen\.", ".conv1_1x1."),
    (r"\.depthwise\.", ".conv2_kxk."),
    (r"\.narrow\.", ".conv3_1x1."),
    (r"\.transformer\.", "."),
    (r"^((?:post_)?quant_proj)\.(qkv|proj)\.", r"\1.attn.\2."),
    (r"^((?:post_)?quant_proj)\.norm_shortcut\.", r"\1.norm3."),
    (r"^((?:post_)?quant_proj)\.shortcut\.", r"\1.proj."),
    (r"^quantizer\.parts\.(\d+)\.codes$", r"quantizer.codebooks.\1.codebook.weight"),
]


def convert(tensors: Mapping[str, Tensor], where: str, config: Mapping[str, Any] | None = None) -> VQGAN:
    """A tokenizer from tensors with the published names.

    config: `num_heads`, the attention heads of an unpublished width.
    """
    tensors = {name: t for name, t in tensors.items() if not name.startswith(TEXT)}
    schema = read_config(tensors, where, config)
    tokenizer = build(VQGAN, checked(schema))
    unused = _unused(schema, shape_of(tensors, "projection.weight", where)[0])
    ours = take(links_of(shapes_of(tokenizer.state_dict())), tensors, where, unused)
    # one vector for all positions (zeros in the published file) is part of the bias before it
    ours["encoder.pool.bias"] = ours["encoder.pool.bias"].float() + tensors["encoder.pos_embed"].float().flatten()
    fill(tokenizer, ours, where)
    part = schema.quantizer.part
    facts = {"vocab_size": part.codebook_size * schema.quantizer.count, "vocab_width": schema.quantizer.dim}
    check_description(config, {**facts, "num_codebooks": schema.quantizer.count})
    tokenizer.provenance = SOURCE
    return tokenizer.eval()  # type: ignore[return-value]


def links_of(shapes: Mapping[str, Shape]) -> list[Link]:
    """Links from our names to the published ones. The keys of the projections have a bias of zeros, in a buffer."""
    theirs = {
        name: (shape[0] // 3,) for name, shape in shapes.items() if name.endswith(".project.qkv.bias")
    }  # three parts
    joined: Rule = (
        r"^((?:post_)?quant_proj\.attn)\.qkv\.bias$",
        (r"\1.q_bias", r"\1.zero_k_bias", r"\1.v_bias"),
    )
    return link(shapes, [*_RULES, joined], theirs)


def _unused(schema: VQGANConfig, joint: int) -> dict[str, Shape]:
    """Published tensors that are not kept. joint: channels of the space of images and texts."""
    width, quantizer = schema.encoder.width, schema.quantizer
    return {
        "encoder.pos_embed": (1, 1, width),
        "fc_norm.weight": (width,),
        "fc_norm.bias": (width,),
        "projection.weight": (joint, width),
        "projection.bias": (joint,),
        "logit_scale": (),
        **{f"quantizer.codebooks.{i}.vocab_usage": (quantizer.part.codebook_size,) for i in range(quantizer.count)},
    }


def read_config(tensors: Mapping[str, Tensor], where: str, config: Mapping[str, Any] | None = None) -> VQGANConfig:
    """Our configuration, from shapes."""
    stem, stages = "encoder.patch_embed.backbone.stem.conv1.weight", "encoder.patch_embed.backbone.stages"
    width = shape_of(tensors, "encoder.norm.weight", where, 1)[0]
    dim = shape_of(tensors, "quant_proj.proj.weight", where)[0]
    heads = width // HEAD_WIDTH if config is None or "num_heads" not in config else config["num_heads"]
    codes, part = shape_of(tensors, "quantizer.codebooks.0.codebook.weight", where)
    first = shape_of(tensors, stem, where, 4)[0]
    second = shape_of(tensors, "encoder.patch_embed.backbone.pool.norm.weight", where, 1)[0]
    encoder = ViTaminEncoderConfig(
        dim,
        (first, second),
        (_count(tensors, f"{stages}.0"), _count(tensors, f"{stages}.1")),
        width,
        _count(tensors, "encoder.blocks"),
        heads,
    )
    expanded = shape_of(tensors, "decoder.up_conv1.conv.weight", where, 4)[0]
    last = shape_of(tensors, "decoder.up_conv4.norm1.weight", where, 1)[0]
    decoder = ViTaminDecoderConfig(
        dim,
        width,
        _count(tensors, "decoder.blocks"),
        heads,
        (expanded, last),
        (_count(tensors, "decoder.up_conv2"), _count(tensors, "decoder.up_conv3")),
    )
    quantizer = MultiCodebookConfig(VQConfig(codes, part, distance="unit"), _count(tensors, "quantizer.codebooks"))
    return VQGANConfig(encoder, quantizer, decoder, kernel=0)


def _count(tensors: Mapping[str, Tensor], prefix: str) -> int:
    """Number of the parts `prefix.0`, `prefix.1`... that a file has."""
    found = (re.match(rf"{re.escape(prefix)}\.(\d+)\.", name) for name in tensors)
    return 1 + max((int(match[1]) for match in found if match), default=-1)


FAMILY = Family(
    convert,
    (
        Checkpoint(
            "FoundationVision/unitok_tokenizer: unitok_tokenizer.pth",
            (256, 256),
            ((2048, 1 << 12),),
            "MIT",
            "the original code at a small size: ids, vectors and pixels; names, shapes and memory of the full size",
        ),
    ),
    wrappers=("trainer.unitok",),
)
