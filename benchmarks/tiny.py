"""Tiny tokenizers with weights by rule, and images by whole numbers: the same for benchmarks and tests everywhere.

`configured` builds the tokenizer of a training configuration instead, as large as it is.
"""

import dataclasses
import re
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

import tokenizers_mm as tmm
from tokenizers_mm._check import require
from tokenizers_mm.config import from_mapping, read_yaml
from tokenizers_mm.decoders.pixel import PixelDecoderConfig
from tokenizers_mm.decoders.semantic import SemanticDecoderConfig
from tokenizers_mm.encoders.dual_semantic import DualSemanticConfig
from tokenizers_mm.encoders.pixel import PixelEncoderConfig
from tokenizers_mm.encoders.qwen2_vit import Qwen2ViTConfig
from tokenizers_mm.encoders.semantic import SemanticEncoderConfig
from tokenizers_mm.layers.rotary import RotaryTransformerConfig
from tokenizers_mm.models import (
    MODELS,
    VQGAN,
    DualViTok,
    DualViTokConfig,
    ImageTokenizer,
    SemanticConfig,
    SemanticTokenizer,
    TokenFlow,
    TokenFlowConfig,
    VQGANConfig,
)
from tokenizers_mm.models.starting import ModelConfig, parse_model
from tokenizers_mm.quantizers import FSQConfig, IBQConfig, LFQConfig, ResidualConfig, VQConfig
from tokenizers_mm.quantizers.shared_index import SharedIndexConfig
from tokenizers_mm.quantizers.vq import SimVQConfig

_GAMMA = 0x9E3779B97F4A7C15
_TABLES = (
    "pos_embed",
    "positional_embedding",
    "position_embedding",
    "cls_token",
    "class_embedding",
    "probe",
    "lvl_embed",
    "pos_1lc",
    "embed_tokens",
)


def uniform(name: str, shape: list[int] | tuple[int, ...], seed: int) -> np.ndarray:
    """float32 in [-1, 1), from the crc32 of the name (splitmix64)."""
    start = (zlib.crc32(name.encode()) + (seed << 32)) * 0xD1342543DE82EF95 + _GAMMA
    with np.errstate(over="ignore"):
        z = np.arange(int(np.prod(shape)), dtype=np.uint64) + np.uint64(start % 2**64)
        for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
            z = (z ^ (z >> np.uint64(shift))) * np.uint64(factor)
        z ^= z >> np.uint64(31)
    return ((z >> np.uint64(40)).astype(np.float32) / np.float32(2**23) - np.float32(1)).reshape(shape)


def offset_and_amplitude(name: str, shape: list[int] | tuple[int, ...]) -> tuple[float, float]:
    """Offset and amplitude of a name by the rule: value = offset + amplitude * uniform."""
    name = name.lower()
    if "embedding_vqkd" in name or "embedding_vqgan" in name:
        return 0.0, 1.0
    if "running_var" in name:
        return 1.0, 0.5
    if "running_mean" in name:
        return 0.0, 0.2
    if found := re.search(r"(norm|ln_|bn)\w*\.(weight|bias)$", name):
        return (1.0, 0.3) if found.group(2) == "weight" else (0.0, 0.2)
    if len(shape) <= 1:
        return 0.0, 0.1
    if any(word in name for word in _TABLES):
        return 0.0, 0.5
    return 0.0, float(np.sqrt(3.0 / np.prod(shape[1:])) * 1.2)


@torch.no_grad()
def by_rule(tokenizer: ImageTokenizer[Any], seed: int = 0) -> ImageTokenizer[Any]:
    """Give a tokenizer weights that follow from their names, in evaluation mode."""
    for name, tensor in tokenizer.state_dict().items():
        offset, amplitude = offset_and_amplitude(name, list(tensor.shape))
        amplitude = 1.0 if "codebooks" in name or name.endswith((".codes", ".frozen")) else amplitude
        values = np.float32(offset) + np.float32(amplitude) * uniform(name, list(tensor.shape), seed)
        tensor.copy_(torch.from_numpy(values))
    return tokenizer.eval()


def configured(path: str | Path, *overrides: str) -> ImageTokenizer[Any]:
    """The tokenizer of a training configuration with random weights, in evaluation mode; nothing is downloaded.

    overrides: key=value in place of those of the file. Raises: ValueError where the file names no family and config.
    """
    objective = read_yaml(path, overrides).get("objective")
    model: Any = objective.get("model") if isinstance(objective, dict) else None
    named = isinstance(model, dict) and {"family", "config"} <= model.keys()
    require(named, "objective.model", "a family and its config", str(path))
    where = "objective.model"
    chosen = from_mapping(ModelConfig, model, where)
    return MODELS[chosen.family].from_config(parse_model(chosen, where)).eval()


def tokenflow_config() -> TokenFlowConfig:
    """TokenFlow for 32 x 32: 21 ids of three scales."""
    tower = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 1, "num_heads": 2}
    return TokenFlowConfig(
        image_size=(32, 32),
        scales=((1, 1), (2, 2), (4, 4)),
        quantizer=SharedIndexConfig(64, (8, 4)),
        semantic_encoder=SemanticEncoderConfig("vit_tiny_patch16_224", tower),
        pixel_encoder=PixelEncoderConfig(16, 32, (1, 2), num_blocks=1, attention_levels=(1,), stem_patch=4),
        semantic_decoder=SemanticDecoderConfig((4, 4), 24, width=32, depth=1, heads=2),
        pixel_decoder=PixelDecoderConfig(16, 32, (1, 2), num_blocks=1, attention_levels=(1,), head_patch=4),
    )


def dualvitok_config() -> DualViTokConfig:
    """DualViTok for multiples of 16."""
    convolutions = {
        "channels": 16,
        "multipliers": (1, 2, 4),
        "num_blocks": 1,
        "attention_levels": (2,),
        "num_groups": 8,
    }
    return DualViTokConfig(
        semantic_encoder=DualSemanticConfig(
            Qwen2ViTConfig(width=32, depth=1, heads=2, out_dim=24), RotaryTransformerConfig(32, 1, 2)
        ),
        semantic_quantizer=SimVQConfig(64, 8),
        semantic_decoder=RotaryTransformerConfig(32, 1, 2, projection="linear_norm"),
        pixel_encoder=PixelEncoderConfig(8, stem_patch=4, resampling="dc", **convolutions),
        pixel_quantizer=SimVQConfig(128, 8),
        pixel_decoder=PixelDecoderConfig(16, head_patch=4, context_channels=16, resampling="dc", **convolutions),
    )


ENCODER = {
    "out_channels": 8,
    "channels": 8,
    "multipliers": [1, 2],
    "num_blocks": 1,
    "attention_levels": [1],
    "num_groups": 4,
}
DECODER = {"in_channels": 8, **{key: value for key, value in ENCODER.items() if key != "out_channels"}}
VQ = {"kind": "vq", "codebook_size": 32, "dim": 6}
TOWER = {
    "name": "vit_tiny_patch16_224",
    "options": {"img_size": 16, "patch_size": 4, "embed_dim": 24, "depth": 1, "num_heads": 2},
}


def vqgan_config(**changes: Any) -> VQGANConfig:
    """VQGAN for even sizes."""
    return from_mapping(VQGANConfig, {"encoder": ENCODER, "quantizer": VQ, "decoder": DECODER, **changes})


def semantic(**changes: Any) -> SemanticTokenizer:
    """Semantic tokenizer for 16 x 16, with torch's weights of seed 0."""
    torch.manual_seed(0)
    data = {"tower": TOWER, "quantizer": VQ, "cell": 4, "image_size": [16, 16], **changes}
    return SemanticTokenizer.from_config(from_mapping(SemanticConfig, data)).eval()


def dualvitok(pixel: Any) -> ImageTokenizer[Any]:
    """The tiny DualViTok, by rule, with another pixel quantizer."""
    return by_rule(DualViTok.from_config(dataclasses.replace(dualvitok_config(), pixel_quantizer=pixel)))


TOKENIZERS: dict[str, Callable[[], ImageTokenizer[Any]]] = {
    "demo-64": lambda: tmm.load("tokenizers_mm/demo-64"),
    "tokenflow": lambda: by_rule(TokenFlow.from_config(tokenflow_config())),
    "dualvitok": lambda: by_rule(DualViTok.from_config(dualvitok_config())),
    "vqgan": lambda: by_rule(VQGAN.from_config(vqgan_config())),
    "semantic": lambda: by_rule(
        semantic(semantic_decoder={"kind": "transformer", "width": 16, "depth": 1, "heads": 2})
    ),
    "vq": lambda: dualvitok(VQConfig(512, 8)),
    "fsq": lambda: dualvitok(FSQConfig((8, 6, 5), 8)),
    "ibq": lambda: dualvitok(IBQConfig(512, 8)),
    "lfq": lambda: dualvitok(LFQConfig(8, groups=2)),
    "residual": lambda: dualvitok(ResidualConfig(stage=VQConfig(256, 8), depth=3)),
}
"""Every family with ids, and every kind of quantizer in one of them."""


def images(size: tuple[int, int] | None, count: int) -> torch.Tensor:
    """Images [count, 3, H, W], by default 32 x 64, with smooth parts, edges and noise, made by whole numbers alone."""
    height, width = size or (32, 64)
    rng = np.random.default_rng(7)
    row, column = np.mgrid[:height, :width]
    made = []
    for index in range(count):
        slopes = rng.integers(-4, 5, (2, 3, 1, 1))
        values = 128 + (slopes[0] * (row - height // 2) + slopes[1] * (column - width // 2)) * 64 // height
        top, left = (int(value) for value in rng.integers(0, (height, width)))
        values[:, top : top + height // 2, left : left + width // 2] += rng.integers(-90, 91, (3, 1, 1))
        values = values + rng.integers(-(index % 7) * 8, index % 7 * 8 + 1, values.shape)
        made.append(values.clip(0, 255).astype(np.uint8).transpose(1, 2, 0))
    return torch.stack([torch.from_numpy(each).permute(2, 0, 1).float().div(127.5).sub(1) for each in made])


def as_pil(x: torch.Tensor) -> list[Image.Image]:
    """PIL images of float [B, 3, H, W] in [-1, 1]."""
    return [Image.fromarray(each.add(1).mul(127.5).round().byte().permute(1, 2, 0).numpy()) for each in x]
