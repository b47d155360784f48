"""Convolutional pixel decoder, codes to image: VQGAN's, TokenFlow's, DualViTok's (MoVQ), the KL-16 autoencoder's, and
those of the MAGVIT-v2 reimplementations and of Infinity."""

from dataclasses import dataclass
from typing import Annotated, Literal

import torch.nn.functional as F
from torch import Tensor, nn

from tokenizers_mm._check import require
from tokenizers_mm.config import Range, Width, checked
from tokenizers_mm.functional.deblocking import deblock, smooth_plain
from tokenizers_mm.layers.conv import (
    ATTENTION_LEVELS,
    AttentionLevels,
    Level,
    Middle,
    MiddleBlocks,
    MoreBlocks,
    Multipliers,
    NormFactory,
    Patch,
    Resampling,
    StillBlocks,
    Upsample,
    blocks_per_level,
    check_levels,
    check_widths,
    silu,
)
from tokenizers_mm.layers.norm import GroupNorm, SpatialNorm, StatisticsNorm
from tokenizers_mm.layers.still import StillDecoder


@dataclass(frozen=True)
class PixelDecoderConfig:
    """Sizes of the decoder, the mirror of `PixelEncoderConfig`; every level has `num_blocks + 1` residual blocks.

    num_blocks, middle, middle_blocks, middle_attention, bias: as there (the first convolution always has a bias).
    still_blocks: residual blocks of temporal layers that z and the context go through first (see `layers.still`).
    level_norms: a norm before every level whose scale and shift are statistics of z (Open-MAGVIT2).
    context_channels: channels of the codes that condition every norm (MoVQ); None for plain group norms.
    head_patch: 1 ends with a 3x3 convolution; p > 1 with depth-to-space by p, for small machines.
    linear: add a linear map of every 3x3 neighbourhood of z to a patch, which a training run can start by regression.
    deblock: steps up to about this size at the edges of the patches are smoothed (`functional.deblocking`); 0: none.
    smooth: deviations up to about this size in plain areas are averaged out (`functional.deblocking`); 0: none.
    """

    in_channels: Width
    channels: Width = 128
    multipliers: Multipliers = (1, 1, 2, 2, 4)
    num_blocks: MoreBlocks = 2
    attention_levels: AttentionLevels = ATTENTION_LEVELS
    middle: bool = True
    head_patch: Patch = 1
    resampling: Resampling = "conv"
    context_channels: Width | None = None
    num_groups: Width = 32
    linear: bool = False
    deblock: Annotated[float, Range(0, 2)] = 0.0
    smooth: Annotated[float, Range(0, 2)] = 0.0
    middle_blocks: MiddleBlocks = 2
    middle_attention: bool = True
    bias: bool = True
    level_norms: bool = False
    still_blocks: StillBlocks = 0
    kind: Literal["cnn"] = "cnn"

    @property
    def factor(self) -> int:
        """Pixels per cell and side."""
        return self.head_patch * 2 ** (len(self.multipliers) - 1)

    def check(self) -> None:
        """Refuse widths that do not go together."""
        check_widths(self.channels, self.multipliers, self.num_groups, self.resampling)
        check_levels(self.num_blocks, self.attention_levels, len(self.multipliers))
        first = self.channels * self.multipliers[-1]
        if self.resampling == "dc":
            require(first % self.in_channels == 0, "in_channels", f"a divisor of {first}", self.in_channels)
        shared = not self.still_blocks or self.context_channels in (None, self.in_channels)
        require(shared, "context_channels", f"{self.in_channels} or none, with still_blocks", self.context_channels)
        require(self.factor >= 6 or not self.deblock, "deblock", "0 for patches of less than 6 pixels", self.deblock)
        require(self.factor >= 2 or not self.smooth, "smooth", "0 for patches of 1 pixel", self.smooth)


class PixelDecoder(nn.Module):
    """z [B, C, h, w] (and, when conditioned, codes [B, context_channels, h, w]) -> image [B, 3, H, W].

    The image is not clamped.
    """

    Config = PixelDecoderConfig

    def __init__(self, config: PixelDecoderConfig) -> None:
        super().__init__()
        self.config = config = checked(config)
        norm = _norm_factory(config)
        widths = [config.channels * m for m in config.multipliers]
        width = widths[-1]
        self.still = StillDecoder(config.in_channels, config.still_blocks) if config.still_blocks else None
        self.conv_in = nn.Conv2d(config.in_channels, width, 3, padding=1)
        self.middle = None
        if config.middle:
            self.middle = Middle(width, norm, config.middle_attention, config.middle_blocks, config.bias)
        self.levels = nn.ModuleList()  # coarse to fine
        self.level_norms = nn.ModuleList() if config.level_norms else None
        counts = blocks_per_level(config.num_blocks, len(widths))
        for index in reversed(range(len(widths))):
            if self.level_norms is not None:
                self.level_norms.append(StatisticsNorm(width, config.in_channels, config.num_groups))
            self.levels.append(
                Level(
                    (width, *[widths[index]] * (counts[index] + 1)),
                    norm,
                    attend=index in config.attention_levels,
                    resample=Upsample(widths[index], config.resampling) if index > 0 else None,
                    bias=config.bias,
                )
            )
            width = widths[index]
        self.norm_out = norm(width)
        self.conv_out = nn.Conv2d(width, 3 * config.head_patch**2, 3, padding=1)
        self.linear = None
        if config.linear:
            out = 3 * config.factor**2
            self.linear = nn.Conv2d(config.in_channels, out, 3, padding=1, padding_mode="replicate")
            for parameter in self.conv_out.parameters():
                nn.init.zeros_(parameter)

    @property
    def last_layer(self) -> nn.Parameter:
        """The weight whose gradient norms balance the adversarial term (VQGAN, eq. 7)."""
        return self.conv_out.weight  # type: ignore[return-value]

    def forward(self, z: Tensor, context: Tensor | None = None) -> Tensor:
        z = z.contiguous()  # over channels-last tensors the CPU's group norm loses two digits
        context = None if context is None else context.contiguous()
        if self.still is not None:
            unused = context is None or self.config.context_channels is None
            z, context = self.still(z), None if unused else self.still(context)
        h = self.conv_in(z)
        if self.config.resampling == "dc":
            h = h + z.repeat_interleave(h.shape[1] // z.shape[1], dim=1)
        if self.middle is not None:
            h = self.middle(h, context)
        for index, level in enumerate(self.levels):
            if self.level_norms is not None:
                h = self.level_norms[index](h, z)
            for block in level:  # type: ignore[attr-defined]
                h = block(h, context)
        h = silu(self.norm_out(h, context))
        image = F.pixel_shuffle(self.conv_out(h), self.config.head_patch)
        if self.linear is not None:
            image = image + F.pixel_shuffle(self.linear(z), self.config.factor)
        if self.config.deblock:
            image = deblock(image, self.config.factor, self.config.deblock)
        return smooth_plain(image, self.config.factor, self.config.smooth) if self.config.smooth else image


def _norm_factory(config: PixelDecoderConfig) -> NormFactory:
    context_channels = config.context_channels
    if context_channels is None:
        return lambda channels: GroupNorm(channels, config.num_groups)
    return lambda channels: SpatialNorm(channels, context_channels, config.num_groups)
