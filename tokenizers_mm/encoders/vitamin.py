"""ViTamin (arXiv 2404.02132) as the encoder of UniTok (arXiv 2502.20321): two convolutional stages, then transformer
blocks without positions, and an attention projection to the channels of the codes."""

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
    StageBlocks,
    StageWidths,
    check_projection,
    mobile_stage,
)


@dataclass(frozen=True)
class ViTaminEncoderConfig:
    """Sizes of the encoder, by default those of ViTamin-Large.

    out_channels: of the codes, a divisor of `width`. stages, blocks: widths and numbers of blocks of the convolutional
    stages; the stem has the first width.
    """

    out_channels: Width = 64
    stages: StageWidths = (160, 320)
    blocks: StageBlocks = (2, 4)
    width: Width = 1024
    depth: Depth = 31
    heads: Heads = 16
    kind: Literal["vitamin"] = "vitamin"

    @property
    def factor(self) -> int:
        """Pixels per cell and side."""
        return 16

    def check(self) -> None:
        """Refuse widths that do not go together."""
        check_block(self.width, self.heads)
        check_projection(self.width, self.out_channels, "out_channels")


class ViTaminEncoder(nn.Module):
    """x [B, 3, H, W] in [-1, 1] -> features [B, C, H / 16, W / 16]."""

    Config = ViTaminEncoderConfig

    def __init__(self, config: ViTaminEncoderConfig) -> None:
        super().__init__()
        self.config = config = checked(config)
        self.factor = config.factor
        first, second = config.stages
        self.conv_in = nn.Conv2d(3, first, 3, stride=2, padding=1)
        self.norm_in = ChannelNorm(first)
        self.conv_stem = nn.Conv2d(first, first, 3, padding=1)
        self.stages = nn.ModuleList(
            mobile_stage(width_in, width, count, "down")
            for width_in, width, count in zip((first, first), config.stages, config.blocks, strict=True)
        )
        self.norm_pool = ChannelNorm(second)
        self.pool = nn.Conv2d(second, config.width, 3, stride=2, padding=1)
        self.transformer = Blocks(config.width, config.depth, config.heads)
        self.project = AttentionProjection(config.width, config.out_channels)

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv_stem(F.gelu(self.norm_in(self.conv_in(x))))
        for stage in self.stages:
            h = stage(h)
        return self.project(self.transformer(self.pool(self.norm_pool(h))))
