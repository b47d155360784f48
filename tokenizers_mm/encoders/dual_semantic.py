"""DualViTok's semantic encoder: a frozen tower and a rotary head (ILLUME+, arXiv 2504.01934, section 3.1)."""

from dataclasses import dataclass, field
from typing import Literal

import torch.nn.functional as F
from torch import Tensor, nn

from tokenizers_mm.encoders.qwen2_vit import Qwen2ViT, Qwen2ViTConfig
from tokenizers_mm.layers.rotary import RotaryTransformer, RotaryTransformerConfig


@dataclass(frozen=True)
class DualSemanticConfig:
    """target: "norm" normalises the tower's tokens (no scale, no shift) for the head and for the decoder's target."""

    tower: Qwen2ViTConfig = field(default_factory=Qwen2ViTConfig)
    head: RotaryTransformerConfig = field(default_factory=RotaryTransformerConfig)
    target: Literal["norm", "identity"] = "norm"


class DualSemanticEncoder(nn.Module):
    """x [B, 3, H, W] in [-1, 1] and the tower's size -> (features [B, h, w, out_dim], target [B, h, w, C])."""

    def __init__(self, config: DualSemanticConfig, out_dim: int) -> None:
        super().__init__()
        self.config = config
        self.tower = Qwen2ViT(config.tower)
        self.head = RotaryTransformer(config.tower.out_dim, out_dim, config.head)

    def forward(self, x: Tensor, size: tuple[int, int]) -> tuple[Tensor, Tensor]:
        target = self.target(self.tower(x, size))
        return self.head(target), target

    def target(self, tokens: Tensor) -> Tensor:
        """Features that the semantic decoder learns to give back, from the tower's tokens [B, h, w, C]."""
        return F.layer_norm(tokens, tokens.shape[-1:], eps=1e-6) if self.config.target == "norm" else tokens
