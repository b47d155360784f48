"""Vision transformer as a pixel decoder (ViT-VQGAN, arXiv 2110.04627; BSQ-ViT, arXiv 2406.07548)."""

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tokenizers_mm.config import Width, checked
from tokenizers_mm.layers.conv import Patch
from tokenizers_mm.layers.patch import PatchTransformer, PatchTransformerConfig


@dataclass(frozen=True)
class PatchDecoderConfig:
    """The transformer, the pixels per patch and side, and the hidden channels between it and the pixels."""

    transformer: PatchTransformerConfig
    patch: Patch = 8
    hidden: Width = 3072
    kind: Literal["vit"] = "vit"

    @property
    def factor(self) -> int:
        """Pixels per cell and side."""
        return self.patch

    @property
    def in_channels(self) -> int:
        """Channels of z."""
        return self.transformer.width


class PatchDecoder(nn.Module):
    """z [B, C, h, w] -> image [B, 3, H, W], not clamped, for the one size of the grid."""

    Config = PatchDecoderConfig

    def __init__(self, config: PatchDecoderConfig) -> None:
        super().__init__()
        self.config = config = checked(config)
        self.transformer = PatchTransformer(config.transformer)
        self.hidden = nn.Conv2d(config.transformer.width, config.hidden, 1)
        self.conv_out = nn.Conv2d(config.hidden, 3 * config.patch**2, 1)

    @property
    def last_layer(self) -> nn.Parameter:
        """The weight whose gradient norms balance the adversarial term (VQGAN, eq. 7)."""
        return self.conv_out.weight  # type: ignore[return-value]

    def forward(self, z: Tensor, context: Tensor | None = None) -> Tensor:
        h = torch.tanh(self.hidden(self.transformer(z)))
        return F.pixel_shuffle(self.conv_out(h), self.config.patch)
