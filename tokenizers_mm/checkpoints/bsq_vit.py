"""BSQ-ViT's image tokenizers (arXiv 2406.07548).

A trainer's file holds `state_dict` with names under `module.`, and `ema_state_dict` under `module.module.`.
"""

import math
import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from tokenizers_mm._check import require
from tokenizers_mm.checkpoints.cnn import shape_of, shapes_of
from tokenizers_mm.checkpoints.family import Checkpoint, Family
from tokenizers_mm.checkpoints.upstream import Link, Rule, Shape, get, link, take
from tokenizers_mm.config import checked
from tokenizers_mm.decoders.patch import PatchDecoderConfig
from tokenizers_mm.encoders.patch import PatchEncoderConfig
from tokenizers_mm.layers.patch import PatchTransformerConfig
from tokenizers_mm.models import Provenance
from tokenizers_mm.models.loading import build, fill
from tokenizers_mm.models.vqgan import VQGAN, VQGANConfig
from tokenizers_mm.quantizers import BSQConfig

SOURCE = Provenance(source="https://github.com/zhaoyue-zephyrus/bsq-vit", license="MIT")

HEAD_WIDTH = 64
"""Channels of an attention head at every published width."""

_RULES: list[Rule] = [
    (r"^head\.", "quant_embed."),
    (r"^embed\.", "post_quant_embed."),
    (r"^encoder\.embed\.", "encoder.conv1."),
    (r"^decoder\.hidden\.", "decoder.ffn.0."),
    (r"\.transformer\.positions$", ".positional_embedding"),
    (r"\.transformer\.norm_in\.", ".ln_pre."),
    (r"\.transformer\.norm\.", ".ln_post."),
    (r"\.blocks\.(\d+)\.norm([12])\.", r".resblocks.\1.ln_\2."),
    (r"\.blocks\.(\d+)\.attn\.qkv\.", r".resblocks.\1.attn.in_proj_"),
    (r"\.blocks\.(\d+)\.attn\.proj\.", r".resblocks.\1.attn.out_proj."),
    (r"\.blocks\.(\d+)\.mlp\.fc1\.", r".resblocks.\1.mlp.c_fc."),
    (r"\.blocks\.(\d+)\.mlp\.fc2\.", r".resblocks.\1.mlp.c_proj."),
]


def convert(tensors: Mapping[str, Tensor], where: str, config: Mapping[str, Any] | None = None) -> VQGAN:
    """A tokenizer from tensors with the published names; `config` may give the heads of an unpublished width."""
    for prefix in ("module.module.", "module."):
        if tensors and all(name.startswith(prefix) for name in tensors):
            tensors = {name.removeprefix(prefix): t for name, t in tensors.items()}
    schema = read_config(tensors, where, config)
    tokenizer = build(VQGAN, checked(schema))
    group = shape_of(tensors, "quantize.group_basis", where, 1)
    unused = {"quantize.basis": (schema.quantizer.dim,), "quantize.group_basis": group}  # powers of two
    fill(tokenizer, take(links_of(shapes_of(tokenizer.state_dict())), tensors, where, unused), where)
    tokenizer.provenance = SOURCE
    return tokenizer.eval()  # type: ignore[return-value]


def links_of(shapes: Mapping[str, Shape]) -> list[Link]:
    """Links from our names to the published ones; ours has 1x1 and patch convolutions where theirs has linear maps."""
    flat = {name: (shape[0], math.prod(shape[1:])) for name, shape in shapes.items() if len(shape) == 4}
    return link(shapes, _RULES, flat)


def read_config(tensors: Mapping[str, Tensor], where: str, config: Mapping[str, Any] | None = None) -> VQGANConfig:
    """Our configuration, from shapes."""
    bits = shape_of(tensors, "quant_embed.weight", where)[0]
    encoder, decoder = (_transformer(tensors, network, where, config) for network in ("encoder", "decoder"))
    pixels = shape_of(tensors, "encoder.conv1.weight", where)[1]
    patch = math.isqrt(pixels // 3)
    require(3 * patch * patch == pixels, f"{where}: encoder.conv1.weight", "square patches", f"{pixels} values")
    hidden = shape_of(tensors, "decoder.conv_out.weight", where)[1]
    return VQGANConfig(PatchEncoderConfig(encoder, patch), BSQConfig(bits), PatchDecoderConfig(decoder, patch, hidden))


def _transformer(
    tensors: Mapping[str, Tensor], network: str, where: str, config: Mapping[str, Any] | None
) -> PatchTransformerConfig:
    count, width = shape_of(tensors, f"{network}.positional_embedding", where)
    side = math.isqrt(count)
    require(side * side == count, f"{where}: {network}.positional_embedding", "a square grid", f"{count} positions")
    found = (re.match(rf"{network}\.transformer\.resblocks\.(\d+)\.", name) for name in tensors)
    depth = 1 + max((int(match[1]) for match in found if match), default=-1)
    hidden = shape_of(tensors, f"{network}.transformer.resblocks.0.mlp.c_fc.weight", where)[0] if depth else 4 * width
    heads = get(config, "vitconfig.heads") if config else width // HEAD_WIDTH
    norm = any(name.startswith(f"{network}.ln_pre.") for name in tensors)
    return PatchTransformerConfig((side, side), width, depth, heads, hidden / width, norm)


FAMILY = Family(
    convert,
    tuple(
        Checkpoint(
            f"the repository's page of models: BSQ-ViT, {bits} bits",
            (256, 256),
            ((1024, 1 << bits),),
            "MIT",
            "the original code at a small size: ids, vectors and pixels; names, shapes and memory of the full size",
        )
        for bits in (18, 36)
    ),
    wrappers=("ema_state_dict", "state_dict"),
)
