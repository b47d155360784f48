"""DualViTok's published checkpoints (ILLUME+, arXiv 2504.01934): sizes, and how the names become ours.

A description has the form of the reference cases' config.json: `vq_model.config` as in the original's training files
and `vit_config` as in the tower's. A file with the published sizes needs none.
"""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from tokenizers_mm._check import require
from tokenizers_mm.checkpoints import upstream
from tokenizers_mm.checkpoints.family import Checkpoint, Family
from tokenizers_mm.checkpoints.upstream import Link, Rule, Shape, get, link, take
from tokenizers_mm.config import checked
from tokenizers_mm.decoders.pixel import PixelDecoderConfig
from tokenizers_mm.encoders.dual_semantic import DualSemanticConfig
from tokenizers_mm.encoders.pixel import PixelEncoderConfig
from tokenizers_mm.encoders.qwen2_vit import Qwen2ViTConfig
from tokenizers_mm.layers.rotary import RotaryTransformerConfig
from tokenizers_mm.models import DualViTok, DualViTokConfig, Provenance
from tokenizers_mm.models.loading import build, fill
from tokenizers_mm.quantizers.vq import SimVQConfig
from tokenizers_mm.resolutions import Resolutions

SOURCE = Provenance(source="ILLUME-MLLM/dualvitok on the Hugging Face hub", license="Apache-2.0")

HEADS = 16
"""Attention heads of the semantic head and decoder, at every width."""

_CONVOLUTIONS = {
    "ch_mult": [1, 1, 2, 2, 4],
    "num_res_blocks": 2,
    "attn_resolutions": [4],
    "use_dc_up_down_blocks": True,
}

PUBLISHED: Mapping[str, Any] = {
    "vq_model": {
        "config": {
            "semantic_encoder": {"num_blocks": 4, "proj_layer": "linear", "embed_dim": 1280, "target_mlp": "norm"},
            "semantic_quantizer": {"type": "SimVQ", "dim": 32, "codebook_size": 32768, "rotation_trick": False},
            "semantic_decoder": {"num_blocks": 4, "proj_layer": "linear_norm", "embed_dim": 1280},
            "pixel_encoder": {"ch": 128, "z_channels": 32, **_CONVOLUTIONS},
            "pixel_quantizer": {"type": "SimVQ", "dim": 32, "codebook_size": 98304, "rotation_trick": False},
            "pixel_decoder": {"ch": 384, "z_channels": 64, **_CONVOLUTIONS},
        }
    },
    "vit_config": {
        "depth": 32,
        "embed_dim": 1280,
        "num_heads": 16,
        "hidden_size": 3584,
        "mlp_ratio": 4,
        "hidden_act": "quick_gelu",
        "patch_size": 14,
        "spatial_merge_size": 2,
        "temporal_patch_size": 2,
    },
}

_RULES: list[Rule] = [
    (r"^semantic_encoder\.tower\.embed\.", "semantic_encoder.model.patch_embed.proj."),
    (r"^semantic_encoder\.tower\.norm\.", "semantic_encoder.model.merger.ln_q."),
    (r"^semantic_encoder\.tower\.merger\.", "semantic_encoder.model.merger.mlp."),
    (r"^semantic_encoder\.tower\.", "semantic_encoder.model."),
    (r"^semantic_encoder\.head\.", "semantic_encoder."),
    (r"^(semantic_(?:en|de)coder)\.embed\.", r"\1.proj_in."),
    (r"^(semantic_(?:en|de)coder)\.project\.", r"\1.proj_out."),
    (r"_quantizer\.frozen$", "_quantizer.frozen_codebook"),
    (r"_quantizer\.transform\.", "_quantizer.code_transform."),
    (r"^pixel_head\.", "pixel_quant_conv."),
    (r"^pixel_embed\.", "pixel_post_quant_conv."),
    (r"^(pixel_.*)\.blocks\.", r"\1.block."),
    (r"^(pixel_.*)\.attentions\.", r"\1.attn."),
    (r"^pixel_(.*)\.middle\.block([12])\.", r"pixel_\1.mid.block_\2."),
    (r"^pixel_(.*)\.middle\.attention\.", r"pixel_\1.mid.attn_1."),
    (r"^(pixel_.*)\.shortcut\.", r"\1.nin_shortcut."),
    (r"^(pixel_.*)\.proj\.", r"\1.proj_out."),
    (r"^pixel_encoder\.levels\.(\d+)\.resample\.", r"pixel_encoder.levels.\1.downsample."),
    (r"^pixel_decoder\.levels\.(\d+)\.resample\.", r"pixel_decoder.levels.\1.upsample."),
    (r"^pixel_encoder\.levels\.", "pixel_encoder.down."),
    (r"^(pixel_decoder\..*norm\w*)\.norm\.", r"\1.norm_layer."),
    (r"^(pixel_decoder\..*)\.scale\.", r"\1.conv_y."),
    (r"^(pixel_decoder\..*)\.shift\.", r"\1.conv_b."),
]
_POINTWISE = ("semantic_encoder.head.embed.weight", "pixel_head.weight", "pixel_embed.weight")
"""Our linear layers that are 1x1 convolutions there."""


def convert(tensors: Mapping[str, Tensor], where: str, config: Mapping[str, Any] | None = None) -> DualViTok:
    """A tokenizer from tensors with the published names; `config` describes an unpublished size."""
    with upstream.description_errors():
        schema = checked(read_config(PUBLISHED if config is None else config))
    tokenizer = build(DualViTok, schema)
    links = links_of(schema, {name: tuple(tensor.shape) for name, tensor in tokenizer.state_dict().items()})
    fill(tokenizer, take(links, tensors, where), where)
    tokenizer.provenance = SOURCE
    return tokenizer.eval()  # type: ignore[return-value]


def read_config(description: Mapping[str, Any]) -> DualViTokConfig:
    """Our configuration of a model described as the reference cases describe theirs."""
    encoder, decoder = _part(description, "pixel_encoder"), _part(description, "pixel_decoder")
    semantic, pixel = _quantizer(description, "semantic_quantizer"), _quantizer(description, "pixel_quantizer")
    merge = get(description, "vq_model.config").get("semantic_detail_merge_type", "cat")
    require(merge == "cat", "config: semantic_detail_merge_type", "'cat'", merge)
    head, tower = _part(description, "semantic_encoder"), _tower(description)
    return DualViTokConfig(
        semantic_encoder=DualSemanticConfig(tower, _transformer(head), head.get("target_mlp", "norm")),
        semantic_quantizer=semantic,
        semantic_decoder=_transformer(_part(description, "semantic_decoder")),
        pixel_encoder=PixelEncoderConfig(out_channels=encoder["z_channels"], **_convolutions(encoder)),
        pixel_quantizer=pixel,
        pixel_decoder=PixelDecoderConfig(
            in_channels=decoder["z_channels"], context_channels=semantic.dim + pixel.dim, **_convolutions(decoder)
        ),
        resolutions=Resolutions(2 ** (len(encoder["ch_mult"]) - 1), tower.patch * tower.merge),
    )


def links_of(config: DualViTokConfig, shapes: Mapping[str, Shape]) -> list[Link]:
    """Links from our names (with `shapes`) to the published ones, for state dicts and for gradients."""
    last = len(config.pixel_decoder.multipliers) - 1  # ours count from the coarsest level, theirs from the finest
    levels: list[Rule] = [
        (rf"^pixel_decoder\.levels\.{index}\.", f"pixel_decoder.up.{last - index}.") for index in range(last + 1)
    ]
    theirs: dict[str, Shape] = {name: (*shapes[name], 1, 1) for name in _POINTWISE if name in shapes}
    return link(shapes, [*_RULES, *levels], theirs)


def _tower(description: Mapping[str, Any]) -> Qwen2ViTConfig:
    sizes = {
        "embed_dim": "width",
        "depth": "depth",
        "num_heads": "heads",
        "hidden_size": "out_dim",
        "hidden_act": "activation",
        "patch_size": "patch",
        "spatial_merge_size": "merge",
        "temporal_patch_size": "frames",
    }
    given = {ours: get(description, f"vit_config.{theirs}") for theirs, ours in sizes.items()}
    return Qwen2ViTConfig(mlp_ratio=float(get(description, "vit_config.mlp_ratio")), **given)


def _transformer(part: Mapping[str, Any]) -> RotaryTransformerConfig:
    return RotaryTransformerConfig(part["embed_dim"], part["num_blocks"], HEADS, projection=part["proj_layer"])


def _quantizer(description: Mapping[str, Any], name: str) -> SimVQConfig:
    part = _part(description, name)
    require(part["type"] == "SimVQ", f"config: {name}.type", "'SimVQ'", repr(part["type"]))
    return SimVQConfig(
        part["codebook_size"], part["dim"], part.get("frozen_codebook_dim"), part.get("rotation_trick", True)
    )


def _convolutions(part: Mapping[str, Any]) -> dict[str, Any]:
    require(not part.get("double_z"), "config: double_z", "false", part.get("double_z"))
    return {
        "channels": part["ch"],
        "multipliers": tuple(part["ch_mult"]),
        "num_blocks": part["num_res_blocks"],
        "attention_levels": tuple(part["attn_resolutions"]),
        "resampling": "dc" if part["use_dc_up_down_blocks"] else "conv",
    }


_NEEDED = {
    "semantic_encoder": ("embed_dim", "num_blocks", "proj_layer"),
    "semantic_decoder": ("embed_dim", "num_blocks", "proj_layer"),
    "semantic_quantizer": ("type", "codebook_size", "dim"),
    "pixel_quantizer": ("type", "codebook_size", "dim"),
    "pixel_encoder": ("ch", "ch_mult", "num_res_blocks", "attn_resolutions", "z_channels", "use_dc_up_down_blocks"),
    "pixel_decoder": ("ch", "ch_mult", "num_res_blocks", "attn_resolutions", "z_channels", "use_dc_up_down_blocks"),
}


def _part(description: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    """One part of `vq_model.config` with all the keys that are read unconditionally."""
    for key in _NEEDED[name]:
        get(description, f"vq_model.config.{name}.{key}")
    return get(description, f"vq_model.config.{name}")


FAMILY = Family(
    convert,
    (
        Checkpoint(
            "ILLUME-MLLM/dualvitok",
            (512, 512),
            ((324, 32768), (1024, 98304)),
            "Apache-2.0",
            "the original code at small sizes: ids, vectors, pixels and gradients; names and shapes of the full size",
        ),
    ),
)
