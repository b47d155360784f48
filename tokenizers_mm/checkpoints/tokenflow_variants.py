"""The released TokenFlow variants: what tells their files apart, and the tower each of them holds.

A description has the form of the reference cases' config.json: `model_args` (teacher, codebook_size, ...), `dims` and
`scales`.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from tokenizers_mm._check import require
from tokenizers_mm.checkpoints.upstream import Rule, Shape, get
from tokenizers_mm.encoders.semantic import CLIP_MEAN, CLIP_STD, SemanticEncoderConfig

Description = Mapping[str, Any]

HALF = (0.5, 0.5, 0.5)
PIXEL = {"ch": 128, "ch_mult": [1, 1, 2, 2, 4], "num_res_blocks": 2, "z_channels": 256}
ENHANCED = {**PIXEL, "ch": 256, "num_res_blocks": 4}


@dataclass(frozen=True)
class Variant:
    """A released variant.

    mark: a name that only its files have. scales: by image size; the first size is the default, `enhanced_size` that of
    a file with the enhanced decoder. rules: names of its tower. tower: a description and an image size to our encoder.
    unused: published tensors of its own that play no part in the model. dims: sizes of the released model.
    """

    mark: str
    scales: dict[int, tuple[int, ...]]
    enhanced_size: int
    rules: list[Rule]
    tower: Callable[[Description, int], SemanticEncoderConfig]
    unused: Callable[[Description], dict[str, Shape]]
    dims: dict[str, Any]


def variant_of(description: Description) -> Variant:
    """The variant that a description names."""
    teacher = get(description, "model_args.teacher")
    require(teacher in VARIANTS, "config: model_args.teacher", f"one of {list(VARIANTS)}", teacher)
    return VARIANTS[teacher]


def _clip(description: Description, size: int) -> SemanticEncoderConfig:
    sizes = {"embed_dim": "width", "depth": "layers", "num_heads": "heads"}
    options = {ours: get(description, f"dims.clip.{theirs}") for ours, theirs in sizes.items()}
    return SemanticEncoderConfig("vit_base_patch16_clip_quickgelu_224", {"img_size": size, **options})


def _siglip(description: Description, size: int) -> SemanticEncoderConfig:
    sizes = {name: get(description, f"dims.siglip.{name}") for name in ("hidden_size", "intermediate_size")}
    options = {
        "img_size": size,
        "embed_dim": sizes["hidden_size"],
        "depth": get(description, "dims.siglip.num_hidden_layers") - 1,  # the features are read before the last layer
        "num_heads": get(description, "dims.siglip.num_attention_heads"),
        "mlp_ratio": (sizes["intermediate_size"] + 0.5) / sizes["hidden_size"],
        "act_layer": "gelu_tanh",
    }
    return SemanticEncoderConfig("vit_so400m_patch14_siglip_384", options, mean=HALF, std=HALF, features="last")


def _vitamin(description: Description, size: int) -> SemanticEncoderConfig:
    described = get(description, "dims.vitamin")
    sizes = described if isinstance(described, Mapping) else VITAMIN  # the full size goes by timm's name
    options = {
        "img_size": size,
        "embed_dim": sizes["embed_dim"][-1],
        "depth": sizes["depth"],
        "num_heads": sizes["num_heads"],
        "embed_cfg": {name: sizes[name] for name in ("embed_dim", "depths", "stem_width")},
    }
    return SemanticEncoderConfig("vitamin_xlarge_256", options, mean=CLIP_MEAN, std=CLIP_STD, features="last")


def _no_tensors(description: Description) -> dict[str, Shape]:
    return {}


def _scaling_layer(description: Description) -> dict[str, Shape]:
    return {f"scaling_layer.{name}": (1, 3, 1, 1) for name in ("shift", "scale")}


def _siglip_end(description: Description) -> dict[str, Shape]:
    """SigLIP's last layer, last norm and pooling head: in the file, behind the place where the features are read."""
    width, hidden = get(description, "dims.siglip.hidden_size"), get(description, "dims.siglip.intermediate_size")
    last = f"encoder.layers.{get(description, 'dims.siglip.num_hidden_layers') - 1}"
    mlp = {"fc1": (hidden, width), "fc2": (width, hidden)}
    layers: dict[str, Shape] = {f"{last}.self_attn.{p}_proj": (width, width) for p in ("q", "k", "v", "out")}
    layers |= {f"{place}.mlp.{name}": shape for place in (last, "head") for name, shape in mlp.items()}
    layers |= {f"{last}.layer_norm{i}": (width,) for i in (1, 2)}
    layers |= {"head.attention.out_proj": (width, width), "head.layernorm": (width,), "post_layernorm": (width,)}
    names = {f"{name}.weight": shape for name, shape in layers.items()}
    names |= {f"{name}.bias": shape[:1] for name, shape in layers.items()}
    names |= {"head.probe": (1, 1, width), "head.attention.in_proj_weight": (3 * width, width)}
    names |= {"head.attention.in_proj_bias": (3 * width,)}
    return {f"encoder_vqkd.vision_model.{name}": shape for name, shape in names.items()} | _scaling_layer(description)


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

SCALES_224 = (1, 2, 4, 6, 8, 10, 12, 14)
SCALES_256 = (*SCALES_224, 16)
SCALES_384 = (1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 12, 14, 17, 22, 27)

VITAMIN = {"embed_dim": [192, 384, 1152], "depths": [2, 4, 1], "stem_width": 192, "depth": 32, "num_heads": 16}

VARIANTS: dict[str, Variant] = {
    "clipb_224": Variant(
        mark="encoder_vqkd.class_embedding",
        scales={224: SCALES_224, 256: SCALES_256},
        enhanced_size=256,
        rules=_CLIP_RULES,
        tower=_clip,
        unused=_no_tensors,
        dims={
            "clip": {"width": 768, "layers": 12, "heads": 12},
            "decoder_vqkd": {"embed_dim": 768, "depth": 3, "num_heads": 12, "grid_trained": 14},
            "semantic_recon_dim": 512,
        },
    ),
    "vitamin_xlarge_256": Variant(
        mark="encoder_vqkd.patch_embed.backbone.stem.conv1.weight",
        scales={256: SCALES_256},
        enhanced_size=256,
        rules=[],  # timm's own names
        tower=_vitamin,
        unused=_scaling_layer,
        dims={
            "vitamin": VITAMIN,
            "decoder_vqkd": {"embed_dim": 1152, "depth": 3, "num_heads": 12, "grid_trained": 16},
            "semantic_recon_dim": 1152,
        },
    ),
    "siglip_384": Variant(
        mark="encoder_vqkd.vision_model.embeddings.patch_embedding.weight",
        scales={384: SCALES_384},
        enhanced_size=384,
        rules=_SIGLIP_RULES,
        tower=_siglip,
        unused=_siglip_end,
        dims={
            "siglip": {
                "hidden_size": 1152,
                "intermediate_size": 4304,
                "num_hidden_layers": 27,
                "num_attention_heads": 16,
            },
            "decoder_vqkd": {"embed_dim": 1152, "depth": 3, "num_heads": 12, "grid_trained": 27},
            "semantic_recon_dim": 1152,
        },
    ),
}
"""By the name the original gives to its teacher."""
