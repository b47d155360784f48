"""Blocks of ViTamin (arXiv 2404.02132); the encoder and decoder of UniTok (arXiv 2502.20321) are made of them."""

from typing import Annotated, Literal

import torch.nn.functional as F
from torch import Tensor, nn

from tokenizers_mm._check import require
from tokenizers_mm.config import Range, Width
from tokenizers_mm.layers.attention import Block, attention, gelu_tanh

EPS = 1e-6
"""Added to the variances of all layer norms, but for those of `AttentionProjection`."""

StageWidths = tuple[Width, Width]
StageBlocks = tuple[Annotated[int, Range(1, 64)], Annotated[int, Range(1, 64)]]
MLP_RATIO = 2
"""Hidden channels of a gated MLP, relative to its width."""

Resize = Literal["none", "down", "up"]


class ChannelNorm(nn.LayerNorm):
    """Layer norm over the channels of [B, C, H, W]."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels, eps=EPS)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class GatedMLP(nn.Module):
    """Norm, then gelu(w0 x) * w1 x, then w2."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width, eps=EPS)
        self.w0 = nn.Linear(width, MLP_RATIO * width)
        self.w1 = nn.Linear(width, MLP_RATIO * width)
        self.w2 = nn.Linear(MLP_RATIO * width, width)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(x)
        return self.w2(gelu_tanh(self.w0(x)) * self.w1(x))


class Blocks(nn.Module):
    """x [B, C, h, w] -> [B, C, h, w] through transformer blocks with gated MLPs, without positions, and a norm."""

    def __init__(self, width: int, depth: int, heads: int) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block(width, heads, eps=EPS, mlp=GatedMLP(width)) for _ in range(depth))
        self.norm = nn.LayerNorm(width, eps=EPS)

    def forward(self, x: Tensor) -> Tensor:
        h = x.flatten(2).transpose(1, 2)
        for block in self.blocks:
            h = block(h)
        return self.norm(h).transpose(1, 2).unflatten(2, x.shape[-2:])


class Doubled(nn.Module):
    """Twice the size: nearest neighbour and a 3x3 convolution."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(in_channels, out_channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))


class Halved(nn.Module):
    """Half the size: the mean of 3x3 values inside the image, and a 1x1 convolution when the width changes."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.expand = nn.Identity()
        if in_channels != out_channels:
            self.expand = nn.Conv2d(in_channels, out_channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.expand(F.avg_pool2d(x, 3, stride=2, padding=1, count_include_pad=False))


class MobileBlock(nn.Module):
    """Pre-norm inverted bottleneck: norm, 1x1, GELU, [up], depthwise 3x3 [stride 2], GELU, 1x1, plus the input.

    GELU acts on the size after `up`, and before it.
    """

    EXPANSION = 4

    def __init__(self, in_channels: int, out_channels: int, resize: Resize) -> None:
        super().__init__()
        hidden = self.EXPANSION * out_channels
        if resize == "none":
            same = in_channels == out_channels
            self.shortcut = nn.Identity() if same else nn.Conv2d(in_channels, out_channels, 1)
        else:
            self.shortcut = (Halved if resize == "down" else Doubled)(in_channels, out_channels)
        self.norm = ChannelNorm(in_channels)
        self.widen = nn.Conv2d(in_channels, hidden, 1)
        self.up = Doubled(hidden, hidden) if resize == "up" else nn.Identity()
        stride = 2 if resize == "down" else 1
        self.depthwise = nn.Conv2d(hidden, hidden, 3, stride=stride, padding=1, groups=hidden)
        self.narrow = nn.Conv2d(hidden, out_channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.up(F.gelu(self.widen(self.norm(x))))
        return self.shortcut(x) + self.narrow(F.gelu(self.depthwise(h)))


def mobile_stage(in_channels: int, out_channels: int, count: int, resize: Resize) -> nn.Sequential:
    """Blocks of one stage; the first one changes the size and the width."""
    first = MobileBlock(in_channels, out_channels, resize)
    return nn.Sequential(first, *(MobileBlock(out_channels, out_channels, "none") for _ in range(count - 1)))


def check_projection(wide: int, narrow: int, name: str) -> None:
    """Refuse widths that `AttentionProjection` cannot join; narrow: channels of one head."""
    require(wide > narrow and wide % narrow == 0, name, f"a divisor of {wide}, the width, and less than it", narrow)


class AttentionProjection(nn.Module):
    """x [B, C, h, w] -> [B, out, h, w]: attention plus a linear map, then a gated MLP.

    The heads have as many channels as the narrower of the two sides: they are averaged on the way down to them, and put
    side by side on the way up from them.
    """

    def __init__(self, in_dim: int, out_dim: int) -> None:
        super().__init__()
        wide, narrow = max(in_dim, out_dim), min(in_dim, out_dim)
        check_projection(wide, narrow, "out_channels")
        self.down, self.heads = in_dim > out_dim, wide // narrow
        self.norm1 = nn.LayerNorm(in_dim)
        self.qkv = nn.Linear(in_dim, 3 * wide)
        self.proj = nn.Linear(out_dim, out_dim)
        self.norm_shortcut = nn.LayerNorm(in_dim)
        self.shortcut = nn.Linear(in_dim, out_dim)
        self.norm2 = nn.LayerNorm(out_dim)
        self.mlp = GatedMLP(out_dim)

    def forward(self, x: Tensor) -> Tensor:
        h = x.flatten(2).transpose(1, 2)
        q, k, v = self.qkv(self.norm1(h)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        found = attention(q, k, v)
        found = found.mean(1) if self.down else found.transpose(1, 2).flatten(2)
        h = self.shortcut(self.norm_shortcut(h)) + self.proj(found)
        h = h + self.mlp(self.norm2(h))
        return h.transpose(1, 2).unflatten(2, x.shape[-2:])
