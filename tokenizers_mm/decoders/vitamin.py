"""Pixel decoder of UniTok (arXiv 2502.20321): ViTamin's encoder (arXiv 2404.02132) the other way round."""

from dataclasses import dataclass
from typing import Literal

import torch.nn.functional as F
from torch import Tensor, nn

from tokenizers_mm.config import Depth, Heads, Width, checked
from tokenizers_mm.layers.attention import check_block
from tokenizers_mm.layers.vitamin import (
    AttentionProjection,
    Blocks,
    ChannelNorm,
    Doubled,
    StageBlocks,
    StageWidths,
    check_projection,
    mobile_stage,
)


@dataclass(frozen=True)
class ViTaminDecoderConfig:
    """Sizes of the decoder, by default those for ViTamin-Large.

    in_channels: of the codes, a divisor of `width`. stages, blocks: widths and numbers of blocks of the convolutional
    stages, from coarse to fine.
    """

    in_channels: Width = 64
    width: Width = 1024
    depth: Depth = 31
    heads: Heads = 16
    stages: StageWidths = (320, 160)
    blocks: StageBlocks = (4, 2)
    kind: Literal["vitamin"] = "vitamin"

    @property
    def factor(self) -> int:
        """Pixels per cell and side."""
        return 16

    def check(self) -> None:
        """Refuse widths that do not go together."""
        check_block(self.width, self.heads)
        check_projection(self.width, self.in_channels, "in_channels")


class ViTaminDecoder(nn.Module):
    """z [B, C, h, w] -> image [B, 3, 16 h, 16 w], not clamped."""

    Config = ViTaminDecoderConfig

    def __init__(self, config: ViTaminDecoderConfig) -> None:
        super().__init__()
        self.config = config = checked(config)
        first, last = config.stages
        self.project = AttentionProjection(config.in_channels, config.width)
        self.transformer = Blocks(config.width, config.depth, config.heads)
        self.expand = Doubled(config.width, first)
        self.stages = nn.ModuleList(
            mobile_stage(first, width, count, "up") for width, count in zip(config.stages, config.blocks, strict=True)
        )
        self.expand_last = Doubled(last, last)
        self.norm_out = ChannelNorm(last)
        self.conv_out = nn.Conv2d(last, 3, 3, padding=1)

    @property
    def last_layer(self) -> nn.Parameter:
        """The weight whose gradient norms balance the adversarial term (VQGAN, eq. 7)."""
        return self.conv_out.weight  # type: ignore[return-value]

    def forward(self, z: Tensor, context: Tensor | None = None) -> Tensor:
        h = self.expand(self.transformer(self.project(z)))
        for stage in self.stages:
            h = stage(h)
        return self.conv_out(F.gelu(self.norm_out(self.expand_last(h))))
