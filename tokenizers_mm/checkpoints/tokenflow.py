"""TokenFlow's published checkpoints (arXiv 2412.03069): which model a file holds, and how its names become ours.

A file says neither its sizes nor its scales; names and shapes tell the variant, and `RELEASED` holds the rest. A size
that was never published is described by `config`, in the form of the reference cases' config.json.
"""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from tokenizers_mm._check import fail, require
from tokenizers_mm.checkpoints.store import build, fill
from tokenizers_mm.checkpoints.upstream import Link, Rule, Shape, link, take
from tokenizers_mm.decoders.pixel import PixelDecoderConfig
from tokenizers_mm.decoders.semantic import SemanticDecoderConfig
from tokenizers_mm.encoders.pixel import PixelEncoderConfig
from tokenizers_mm.encoders.semantic import CLIP_MEAN, CLIP_STD, SemanticEncoderConfig
from tokenizers_mm.functional.positions import resize_positions
from tokenizers_mm.models import Provenance, TokenFlow, TokenFlowConfig
from tokenizers_mm.quantizers.shared_index import SharedIndexConfig

SOURCE = Provenance(source="https://huggingface.co/ByteFlow-AI/TokenFlow", license="MIT")

USAGE_WINDOW = 131072
"""Length of the published buffer of recent ids, which is statistics only and is not kept."""

SCALES_224 = (1, 2, 4, 6, 8, 10, 12, 14)
SCALES_256 = (*SCALES_224, 16)
SCALES_384 = (1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 12, 14, 17, 22, 27)

_PIXEL = {"ch": 128, "ch_mult": [1, 1, 2, 2, 4], "num_res_blocks": 2, "z_channels": 256}
_ENHANCED = {**_PIXEL, "ch": 256, "num_res_blocks": 4}
_HALF = (0.5, 0.5, 0.5)

RELEASED: dict[str, dict[str, Any]] = {
    "clipb_224": {
        "clip": {"width": 768, "layers": 12, "heads": 12},
        "decoder_vqkd": {"embed_dim": 768, "depth": 3, "num_heads": 12, "grid_trained": 14},
        "semantic_recon_dim": 512,
    },
    "vitamin_xlarge_256": {
        "vitamin": {
            "embed_dim": [192, 384, 1152],
            "depths": [2, 4, 1],
            "stem_width": 192,
            "depth": 32,
            "num_heads": 16,
        },
        "decoder_vqkd": {"embed_dim": 1152, "depth": 3, "num_heads": 12, "grid_trained": 16},
        "semantic_recon_dim": 1152,
    },
    "siglip_384": {
        "siglip": {
            "hidden_size": 1152,
            "intermediate_size": 4304,
            "num_hidden_layers": 27,
            "num_attention_heads": 16,
        },
        "decoder_vqkd": {"embed_dim": 1152, "depth": 3, "num_heads": 12, "grid_trained": 27},
        "semantic_recon_dim": 1152,
    },
}
"""Sizes of the released variants, in the form of `dims` of the reference cases."""

TRAITS: dict[str, tuple[str, tuple[int, ...], int]] = {
    "clipb_224": ("encoder_vqkd.class_embedding", SCALES_224, 224),
    "vitamin_xlarge_256": ("encoder_vqkd.patch_embed.backbone.stem.conv1.weight", SCALES_256, 256),
    "siglip_384": ("encoder_vqkd.vision_model.embeddings.patch_embedding.weight", SCALES_384, 384),
}
"""By variant: a name that only its files have, the scales, and the image size."""

_PIXEL_RULES: list[Rule] = [
    (r"^pixel_encoder\.", "encoder."),
    (r"^pixel_decoder\.", "decoder."),
    (r"^(en|de)coder\.levels\.(\d+)\.blocks\.", r"\1coder.conv_blocks.\2.res."),
    (r"^(en|de)coder\.levels\.(\d+)\.attentions\.", r"\1coder.conv_blocks.\2.attn."),
    (r"^encoder\.levels\.(\d+)\.resample\.", r"encoder.conv_blocks.\1.downsample."),
    (r"^decoder\.levels\.(\d+)\.resample\.", r"decoder.conv_blocks.\1.upsample."),
    (r"^(en|de)coder\.middle\.block1\.", r"\1coder.mid.0."),
    (r"^(en|de)coder\.middle\.attention\.", r"\1coder.mid.1."),
    (r"^(en|de)coder\.middle\.block2\.", r"\1coder.mid.2."),
    (r"^((?:en|de)coder\..*)\.shortcut\.", r"\1.nin_shortcut."),
    (r"^((?:en|de)coder\..*)\.proj\.", r"\1.proj_out."),
    (r"^pixel_head\.", "quant_conv."),
    (r"^pixel_embed\.", "post_quant_conv."),
]
_SEMANTIC_RULES: list[Rule] = [
    (r"^semantic_head\.", "encode_task_layer."),
    (r"^semantic_decoder\.head\.", "decode_task_layer."),
    (r"^semantic_decoder\.norm\.", "decoder_vqkd.fc_norm."),
    (r"^semantic_decoder\.embed\.", "decoder_vqkd.patch_embed.proj."),
    (r"^semantic_decoder\.class_token$", "decoder_vqkd.cls_token"),
    (r"^semantic_decoder\.positions$", "decoder_vqkd.pos_embed"),
    (r"^semantic_decoder\.(.*)\.qkv\.bias$", (r"decoder_vqkd.\1.q_bias", None, r"decoder_vqkd.\1.v_bias")),
    (r"^semantic_decoder\.", "decoder_vqkd."),
    (r"^quantizer\.quantizer\.codebooks\.0$", "quantize.embedding_vqkd.weight"),
    (r"^quantizer\.quantizer\.codebooks\.1$", "quantize.embedding_vqgan.weight"),
    (r"^semantic_encoder\.tower\.", "encoder_vqkd."),
]
_CLIP_RULES: list[Rule] = [
    (r"^encoder_vqkd\.cls_token$", "encoder_vqkd.class_embedding"),
    (r"^encoder_vqkd\.pos_embed$", "encoder_vqkd.positional_embedding"),
    (r"^encoder_vqkd\.patch_embed\.proj\.", "encoder_vqkd.conv1."),
    (r"^encoder_vqkd\.norm_pre\.", "encoder_vqkd.ln_pre."),
    (r"^encoder_vqkd\.norm\.", "encoder_vqkd.ln_post."),
    (r"^encoder_vqkd\.blocks\.", "encoder_vqkd.transformer.resblocks."),
    (r"^(encoder_vqkd\..*)\.norm([12])\.", r"\1.ln_\2."),
    (r"^(encoder_vqkd\..*)\.qkv\.", r"\1.in_proj_"),
    (r"^(encoder_vqkd\..*)\.attn\.proj\.", r"\1.attn.out_proj."),
    (r"^(encoder_vqkd\..*)\.fc1\.", r"\1.c_fc."),
    (r"^(encoder_vqkd\..*)\.fc2\.", r"\1.c_proj."),
]
_SIGLIP_RULES: list[Rule] = [
    (r"^encoder_vqkd\.", "encoder_vqkd.vision_model."),
    (r"model\.patch_embed\.proj\.", "model.embeddings.patch_embedding."),
    (r"model\.pos_embed$", "model.embeddings.position_embedding.weight"),
    (r"model\.blocks\.", "model.encoder.layers."),
    (r"(model\..*)\.norm([12])\.", r"\1.layer_norm\2."),
    (
        r"(.*model\..*)\.attn\.qkv\.(.*)",
        (r"\1.self_attn.q_proj.\2", r"\1.self_attn.k_proj.\2", r"\1.self_attn.v_proj.\2"),
    ),
    (r"(model\..*)\.attn\.proj\.", r"\1.self_attn.out_proj."),
]
TOWER_RULES: dict[str, list[Rule]] = {
    "clipb_224": _CLIP_RULES,
    "vitamin_xlarge_256": [],
    "siglip_384": _SIGLIP_RULES,
}


def convert(
    tensors: Mapping[str, Tensor], where: str, config: Mapping[str, Any] | None = None, *, image_size: int = 0
) -> TokenFlow:
    """A tokenizer from tensors with the published names.

    image_size: 224 or 256 for a CLIP checkpoint, which serves both; 0 takes what the original's scripts use: 256 with
    the enhanced decoder, 224 with the base one. The other variants have one size.
    """
    description = dict(config) if config is not None else recognise(tensors, where, image_size)
    if config is not None and image_size:
        same = _get(description, "dims.image_size")
        require(image_size == same, "image_size", f"{same}, as the config has it", image_size)
    schema = read_config(description)
    tokenizer = build(TokenFlow, schema)
    links = links_of(description, schema, {name: tuple(t.shape) for name, t in tokenizer.state_dict().items()})
    fill(tokenizer, take(links, tensors, where, unused_of(description)), where)
    _check_scaling(tensors, schema, where)
    tokenizer.provenance = Provenance(SOURCE.source, SOURCE.license, notice=_notice(description))
    return tokenizer.eval()  # type: ignore[return-value]


def recognise(tensors: Mapping[str, Tensor], where: str, image_size: int = 0) -> dict[str, Any]:
    """The description of a released variant, from names and shapes."""
    found = [name for name, (key, _, _) in TRAITS.items() if key in tensors]
    codebook = tensors.get("quantize.embedding_vqkd.weight")
    if not found or codebook is None:
        fail(where, f"a TokenFlow checkpoint ({', '.join(TRAITS)})", "names of another model")
    teacher = found[0]
    enhanced = "decoder.conv_blocks.0.res.4.conv1.weight" in tensors
    _, scales, size = TRAITS[teacher]
    sizes = (224, 256) if teacher == "clipb_224" else (size,)
    chosen = image_size or (256 if teacher == "clipb_224" and enhanced else size)
    require(chosen in sizes, "image_size", " or ".join(map(str, sizes)), chosen)
    decoder = _ENHANCED if enhanced else _PIXEL
    return {
        "model_args": {"teacher": teacher, "codebook_size": codebook.shape[0]},
        "dims": {**RELEASED[teacher], "image_size": chosen, "pixel_encoder": _PIXEL, "pixel_decoder": decoder},
        "scales": list(scales if chosen == size else SCALES_256),
    }


def read_config(description: Mapping[str, Any]) -> TokenFlowConfig:
    """Our configuration of a model described as the reference cases describe theirs."""
    scales = _get(description, "scales")
    grid, size, width = (
        scales[-1],
        _get(description, "dims.image_size"),
        _get(description, "dims.decoder_vqkd.embed_dim"),
    )
    encoder, decoder = _get(description, "dims.pixel_encoder"), _get(description, "dims.pixel_decoder")
    codes = description["model_args"]
    factor = 2 ** (len(encoder["ch_mult"]) - 1)
    dims = (codes.get("semantic_code_dim", 32), codes.get("codebook_embed_dim", 8))
    semantic = _get(description, "dims.decoder_vqkd")
    return TokenFlowConfig(
        image_size=(size, size),
        scales=tuple((s, s) for s in scales),
        quantizer=SharedIndexConfig(_get(description, "model_args.codebook_size"), dims),
        semantic_encoder=_tower(description, size),
        pixel_encoder=PixelEncoderConfig(**_pixel(encoder, "out_channels")),
        semantic_decoder=SemanticDecoderConfig(
            (grid, grid), _get(description, "dims.semantic_recon_dim"), width, semantic["depth"], semantic["num_heads"]
        ),
        pixel_decoder=PixelDecoderConfig(**_pixel(decoder, "in_channels")),
        pixel_size=None if grid * factor == size else (grid * factor, grid * factor),
    )


def links_of(description: Mapping[str, Any], schema: TokenFlowConfig, shapes: Mapping[str, Shape]) -> list[Link]:
    """Links from our names (with `shapes`) to the published ones."""
    theirs: dict[str, Shape] = {
        name: (*shapes[name], 1, 1)
        for name in ("pixel_head.weight", "pixel_embed.weight", "semantic_decoder.embed.weight")
    }
    teacher = _teacher(description)
    for name in ("semantic_encoder.tower.cls_token", "semantic_encoder.tower.pos_embed"):
        if name in shapes:
            theirs[name] = tuple(n for i, n in enumerate(shapes[name]) if i > 0 and (i > 1 or n > 1))
    links = link(shapes, [*_PIXEL_RULES, *_SEMANTIC_RULES, *TOWER_RULES[teacher]], theirs)
    trained, grid = (_get(description, "dims.decoder_vqkd.grid_trained"),) * 2, schema.scales[-1]
    return links if trained == grid else [_resized(item, trained, grid) for item in links]


def unused_of(description: Mapping[str, Any]) -> dict[str, Shape]:
    """Published tensors that play no part in the model, with their shapes."""
    unused: dict[str, Shape] = {"quantize.codebook_used": (USAGE_WINDOW,)}
    teacher = _teacher(description)
    if teacher != "clipb_224":
        unused |= {f"scaling_layer.{name}": (1, 3, 1, 1) for name in ("shift", "scale")}
    if teacher != "siglip_384":
        return unused
    sizes = _get(description, "dims.siglip")
    width, hidden, last = sizes["hidden_size"], sizes["intermediate_size"], sizes["num_hidden_layers"] - 1
    square, mlp = (width, width), {"fc1": (hidden, width), "fc2": (width, hidden)}
    layers: dict[str, Shape] = {f"encoder.layers.{last}.self_attn.{p}_proj": square for p in ("q", "k", "v", "out")}
    layers |= {f"encoder.layers.{last}.mlp.{name}": shape for name, shape in mlp.items()}
    layers |= {f"head.mlp.{name}": shape for name, shape in mlp.items()}
    layers |= {"head.attention.out_proj": square, "head.layernorm": (width,), "post_layernorm": (width,)}
    layers |= {f"encoder.layers.{last}.layer_norm{i}": (width,) for i in (1, 2)}
    names = {f"{name}.weight": shape for name, shape in layers.items()}
    names |= {f"{name}.bias": shape[:1] for name, shape in layers.items()}
    names |= {"head.probe": (1, 1, width), "head.attention.in_proj_weight": (3 * width, width)}
    names |= {"head.attention.in_proj_bias": (3 * width,)}
    return unused | {f"encoder_vqkd.vision_model.{name}": shape for name, shape in names.items()}


def _tower(description: Mapping[str, Any], size: int) -> SemanticEncoderConfig:
    """The semantic encoder: a timm tower by name, with its sizes."""
    teacher = _teacher(description)
    dims = _get(description, f"dims.{teacher.split('_')[0].removesuffix('b')}")
    if teacher == "clipb_224":
        options = {"img_size": size, "embed_dim": dims["width"], "depth": dims["layers"], "num_heads": dims["heads"]}
        return SemanticEncoderConfig("vit_base_patch16_clip_quickgelu_224", options)
    if teacher == "siglip_384":
        width = dims["hidden_size"]
        options = {
            "embed_dim": width,
            "depth": dims["num_hidden_layers"] - 1,  # the features are read before the last layer
            "num_heads": dims["num_attention_heads"],
            "mlp_ratio": (dims["intermediate_size"] + 0.5) / width,
            "act_layer": "gelu_tanh",
        }
        return SemanticEncoderConfig("vit_so400m_patch14_siglip_384", options, mean=_HALF, std=_HALF, features="last")
    sizes = RELEASED[teacher]["vitamin"] if isinstance(dims, str) else dims
    stem = {name: sizes[name] for name in ("embed_dim", "depths", "stem_width")}
    options = {"embed_dim": sizes["embed_dim"][-1], "depth": sizes["depth"], "num_heads": sizes["num_heads"]}
    return SemanticEncoderConfig(
        "vitamin_xlarge_256", {**options, "embed_cfg": stem}, mean=CLIP_MEAN, std=CLIP_STD, features="last"
    )


def _pixel(sizes: Mapping[str, Any], outside: str) -> dict[str, Any]:
    return {
        outside: sizes["z_channels"],
        "channels": sizes["ch"],
        "multipliers": tuple(sizes["ch_mult"]),
        "num_blocks": sizes["num_res_blocks"],
        "attention_levels": (len(sizes["ch_mult"]) - 1,),
    }


def _resized(item: Link, trained: tuple[int, int], grid: tuple[int, int]) -> Link:
    """The link of a position table that is interpolated from the grid it was trained on; others as they are."""
    if not item.ours.endswith((".pos_embed", ".positions")):
        return item
    count = 1 + trained[0] * trained[1]
    their_shape = tuple(count if n == item.shape[1] else n for n in item.their_shape)
    return Link(item.ours, item.shape, item.theirs, their_shape, partial(_interpolate, trained=trained, grid=grid))


def _interpolate(table: Tensor, trained: tuple[int, int], grid: tuple[int, int]) -> Tensor:
    return resize_positions(table.reshape(1, *table.shape[-2:]), trained, grid)


def _check_scaling(tensors: Mapping[str, Tensor], schema: TokenFlowConfig, where: str) -> None:
    """The input normalisation is a constant of the variant: a file with another one is another model."""
    for name, value in (("shift", schema.semantic_encoder.mean), ("scale", schema.semantic_encoder.std)):
        key = f"scaling_layer.{name}"
        if value is not None and not torch.allclose(tensors[key].flatten().float(), torch.tensor(value)):
            fail(f"{where}: {key}", str(value), str(tensors[key].flatten().tolist()))


def _notice(description: Mapping[str, Any]) -> str:
    size = _get(description, "dims.image_size")
    if _teacher(description) != "clipb_224":
        return ""
    other = 480 - size
    return (
        f"The checkpoint serves 224 and 256 pixels; it was read for {size} (option image_size={other} for the other)."
    )


def _teacher(description: Mapping[str, Any]) -> str:
    teacher = _get(description, "model_args.teacher")
    require(teacher in TRAITS, "config: model_args.teacher", f"one of {list(TRAITS)}", teacher)
    return teacher


def _get(description: Mapping[str, Any], path: str) -> Any:
    """A value of the description; one sentence when it is not there."""
    value: Any = description
    for key in path.split("."):
        if not isinstance(value, Mapping) or value.get(key) is None:
            fail(f"config: {path}", "a value", "nothing")
        value = value[key]
    return value
