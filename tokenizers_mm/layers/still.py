"""Temporal layers of Emu3's video tokenizer (arXiv 2409.18869) as they act on one still image.

Its four frames are equal, and its causal convolutions see zeros before the first, so that two frames are different
after the first convolution, and one is left after the second; what each frame reads is one convolution in two axes.
"""

import torch.nn.functional as F
from torch import Tensor, nn

from tokenizers_mm.layers.conv import ResBlock
from tokenizers_mm.layers.norm import BatchNorm


class StillEncoder(nn.Module):
    """x [B, C, h, w] -> [B, C, h, w]: both halvings of time, then residual blocks."""

    def __init__(self, channels: int, num_blocks: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(channels, 2 * channels, 3, padding=1)
        self.second = nn.Conv2d(2 * channels, channels, 3, padding=1)
        self.blocks = nn.ModuleList(ResBlock(channels, channels, BatchNorm) for _ in range(num_blocks))

    def forward(self, x: Tensor) -> Tensor:
        x = F.silu(self.second(F.silu(self.first(x))))
        for block in self.blocks:
            x = block(x)
        return x


class StillDecoder(nn.Module):
    """x [B, C, h, w] -> [B, C, h, w]: residual blocks, then the first frame of both doublings of time."""

    def __init__(self, channels: int, num_blocks: int) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(ResBlock(channels, channels, BatchNorm) for _ in range(num_blocks))
        self.convolutions = nn.ModuleList(nn.Conv2d(channels, channels, 3, padding=1) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        for convolution in self.convolutions:
            x = F.silu(convolution(x))
        return x
