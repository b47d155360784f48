"""Blocks of the convolutional encoders and decoders (VQGAN, arXiv 2012.09841; DC shortcuts: DC-AE, arXiv 2410.10733).

Every block takes (x, context); the context reaches the norms that want it (see `layers.norm`).
"""

from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from typing import Annotated, Literal, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tokenizers_mm._check import require
from tokenizers_mm.config import Length, Range
from tokenizers_mm.layers.attention import attention

NormFactory = Callable[[int], nn.Module]
Resampling = Literal["conv", "dc", "shuffle"]
"""Changes of size: strided convolution padded at the right and bottom, and nearest neighbour (VQGAN); DC-AE's; strided
convolution padded on all sides, and depth-to-space (MAGVIT-v2, arXiv 2310.05737)."""

Multipliers = Annotated[tuple[Annotated[int, Range(1, 256)], ...], Length(1, 10)]
AttentionLevels = Annotated[tuple[Annotated[int, Range(0, 9)], ...], Length(0, 10)]
_Blocks = Annotated[int, Range(1, 64)]
_MoreBlocks = Annotated[int, Range(0, 63)]
NumBlocks: TypeAlias = _Blocks | Annotated[tuple[_Blocks, ...], Length(1, 10)]
MoreBlocks: TypeAlias = _MoreBlocks | Annotated[tuple[_MoreBlocks, ...], Length(1, 10)]
Patch = Annotated[int, Range(1, 256)]
MiddleBlocks = Annotated[int, Range(2, 64)]
StillBlocks = Annotated[int, Range(0, 64)]
"""Limits of the fields that convolutional encoders and decoders share."""

ATTENTION_LEVELS = (4,)
"""Default of `attention_levels`, for the five levels of the default multipliers."""


def blocks_per_level(num_blocks: int | tuple[int, ...], levels: int) -> tuple[int, ...]:
    """One number of residual blocks per level, from one for all or from one for each."""
    counts = (num_blocks,) * levels if isinstance(num_blocks, int) else num_blocks
    require(len(counts) == levels, "num_blocks", f"one number, or {levels}", num_blocks)
    return counts


def check_levels(num_blocks: int | tuple[int, ...], attention_levels: Sequence[int], levels: int) -> None:
    """Refuse numbers of blocks for another number of levels, and attention at a level that there is not.

    The default, the fifth level, stands for none where there are fewer: so it is in saved files.
    """
    blocks_per_level(num_blocks, levels)
    known = tuple(attention_levels) == ATTENTION_LEVELS or all(level < levels for level in attention_levels)
    require(known, "attention_levels", f"levels from 0 to {levels - 1}", attention_levels)


def check_widths(channels: int, multipliers: Sequence[int], num_groups: int, resampling: Resampling) -> None:
    """Refuse widths that the norms cannot group or that "dc" cannot rearrange."""
    for width in (channels, *(channels * multiplier for multiplier in multipliers)):
        require(width % num_groups == 0, "num_groups", f"a divisor of {width} channels", num_groups)
        require(resampling != "dc" or width % 4 == 0, "channels", "multiples of 4 for resampling: dc", width)


def silu(x: Tensor) -> Tensor:
    """SiLU of a value that nobody else holds: in place where no gradient is kept."""
    return F.silu(x, inplace=not torch.is_grad_enabled())


class ResBlock(nn.Module):
    """Norm, SiLU, 3x3 convolution, twice, plus the input (through a 1x1 convolution when the width changes)."""

    def __init__(self, in_channels: int, out_channels: int, norm: NormFactory, bias: bool = True) -> None:
        super().__init__()
        self.norm1 = norm(in_channels)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1, bias=bias)
        self.norm2 = norm(out_channels)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=bias)
        same = in_channels == out_channels
        self.shortcut = nn.Identity() if same else nn.Conv2d(in_channels, out_channels, 1, bias=bias)

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        h = self.conv1(silu(self.norm1(x, context)))
        h = silu(self.norm2(h, context))  # frees the one before
        h = self.conv2(h)
        return self.shortcut(x) + h


class ConvAttention(nn.Module):
    """Single-head self-attention over all positions of a feature map, with 1x1 projections."""

    def __init__(self, channels: int, norm: NormFactory) -> None:
        super().__init__()
        self.norm = norm(channels)
        self.q = nn.Conv2d(channels, channels, 1)
        self.k = nn.Conv2d(channels, channels, 1)
        self.v = nn.Conv2d(channels, channels, 1)
        self.proj = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        h = self.norm(x, context)
        q, k, v = (layer(h).flatten(2).transpose(1, 2)[:, None] for layer in (self.q, self.k, self.v))
        h = attention(q, k, v)[:, 0].transpose(1, 2).unflatten(2, x.shape[-2:])
        return x + self.proj(h)


class Downsample(nn.Module):
    """Halve the size: a stride-2 convolution padded at the right and bottom (`conv`) or on all sides (`shuffle`), or
    space-to-depth with an average-pooled shortcut (`dc`)."""

    def __init__(self, channels: int, how: Resampling) -> None:
        super().__init__()
        self.how = how
        if how == "dc":
            self.conv = nn.Conv2d(channels, channels // 4, 3, padding=1)
        else:
            self.conv = nn.Conv2d(channels, channels, 3, stride=2, padding=0 if how == "conv" else 1)

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        if self.how != "dc":
            return self.conv(F.pad(x, (0, 1, 0, 1)) if self.how == "conv" else x)
        return F.pixel_unshuffle(self.conv(x), 2) + F.avg_pool2d(x, 2)


class Upsample(nn.Module):
    """Double the size: nearest neighbour and a convolution (`conv`), a convolution and depth-to-space (`shuffle`, the
    four offsets slowest in the channels), or depth-to-space with a nearest-neighbour shortcut (`dc`)."""

    def __init__(self, channels: int, how: Resampling) -> None:
        super().__init__()
        self.how = how
        self.conv = nn.Conv2d(channels, channels if how == "conv" else 4 * channels, 3, padding=1)

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        if self.how == "shuffle":
            return F.pixel_shuffle(self.conv(x).unflatten(1, (4, -1)).transpose(1, 2).flatten(1, 2), 2)
        larger = F.interpolate(x, scale_factor=2.0, mode="nearest")
        if self.how == "conv":
            return self.conv(larger)
        return F.pixel_shuffle(self.conv(x), 2) + larger


class Level(nn.Module):
    """Residual blocks of one resolution, each followed by attention when asked, then a change of size."""

    def __init__(
        self,
        widths: tuple[int, ...],
        norm: NormFactory,
        attend: bool,
        resample: nn.Module | None,
        bias: bool = True,
    ) -> None:
        """`widths` holds the input width and then the output width of every residual block; bias: of their
        convolutions."""
        super().__init__()
        self.blocks = nn.ModuleList(ResBlock(a, b, norm, bias) for a, b in pairwise(widths))
        self.attentions = nn.ModuleList(ConvAttention(b, norm) for b in widths[1:]) if attend else None
        self.resample = resample

    def __iter__(self) -> Iterator[nn.Module]:
        """The blocks in order. A network that goes through them itself holds no input longer than it is needed."""
        for index, block in enumerate(self.blocks):
            yield block
            if self.attentions is not None:
                yield self.attentions[index]
        if self.resample is not None:
            yield self.resample

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        for block in self:
            x = block(x, context)
        return x


class Middle(nn.Module):
    """Residual block, attention (unless left out), and more residual blocks: `num_blocks` in all, at least two."""

    def __init__(
        self, channels: int, norm: NormFactory, attend: bool = True, num_blocks: int = 2, bias: bool = True
    ) -> None:
        super().__init__()
        self.block1 = ResBlock(channels, channels, norm, bias)
        self.attention = ConvAttention(channels, norm) if attend else None
        self.block2 = ResBlock(channels, channels, norm, bias)
        self.others = nn.ModuleList(ResBlock(channels, channels, norm, bias) for _ in range(num_blocks - 2))

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        x = self.block1(x, context)
        if self.attention is not None:
            x = self.attention(x, context)
        x = self.block2(x, context)
        for block in self.others:
            x = block(x, context)
        return x
