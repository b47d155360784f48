"""Convolutional pixel decoder, codes to image: TokenFlow's, DualViTok's (MoVQ) and the KL-16 autoencoder's."""

from dataclasses import dataclass
from typing import Annotated

import torch.nn.functional as F
from torch import Tensor, nn

from tokenizers_mm._check import require
from tokenizers_mm.config import Range, Width, checked
from tokenizers_mm.functional.deblocking import deblock
from tokenizers_mm.layers.conv import (
    AttentionLevels,
    Level,
    Middle,
    Multipliers,
    NormFactory,
    NumBlocks,
    Patch,
    Resampling,
    Upsample,
    check_widths,
    silu,
)
from tokenizers_mm.layers.norm import GroupNorm, SpatialNorm


@dataclass(frozen=True)
class PixelDecoderConfig:
    """Sizes of the decoder, the mirror of `PixelEncoderConfig`; every level has `num_blocks + 1` residual blocks.

    context_channels: channels of the codes that condition every norm (MoVQ); None for plain group norms.
    head_patch: 1 ends with a 3x3 convolution; p > 1 with depth-to-space by p, for small machines.
    linear: add a linear map of every 3x3 neighbourhood of z to a patch, which a training run can start by regression.
    deblock: steps up to about this size at the edges of the patches are smoothed (`functional.deblocking`); 0: none.
    """

    in_channels: Width
    channels: Width = 128
    multipliers: Multipliers = (1, 1, 2, 2, 4)
    num_blocks: NumBlocks = 2
    attention_levels: AttentionLevels = (4,)
    middle: bool = True
    head_patch: Patch = 1
    resampling: Resampling = "conv"
    context_channels: Width | None = None
    num_groups: Width = 32
    linear: bool = False
    deblock: Annotated[float, Range(0, 2)] = 0.0

    @property
    def factor(self) -> int:
        """Pixels per cell and side."""
        return self.head_patch * 2 ** (len(self.multipliers) - 1)

    def check(self) -> None:
        """Refuse widths that do not go together."""
        check_widths(self.channels, self.multipliers, self.num_groups, self.resampling)
        first = self.channels * self.multipliers[-1]
        if self.resampling == "dc":
            require(first % self.in_channels == 0, "in_channels", f"a divisor of {first}", self.in_channels)
        require(self.factor >= 6 or not self.deblock, "deblock", "0 for patches of less than 6 pixels", self.deblock)


class PixelDecoder(nn.Module):
    """z [B, C, h, w] (and, when conditioned, codes [B, context_channels, h, w]) -> image [B, 3, H, W].

    The image is not clamped.
    """

    def __init__(self, config: PixelDecoderConfig) -> None:
        super().__init__()
        self.config = config = checked(config)
        norm = _norm_factory(config)
        widths = [config.channels * m for m in config.multipliers]
        width = widths[-1]
        self.conv_in = nn.Conv2d(config.in_channels, width, 3, padding=1)
        self.middle = Middle(width, norm) if config.middle else None
        self.levels = nn.ModuleList()  # coarse to fine
        for index in reversed(range(len(widths))):
            self.levels.append(
                Level(
                    (width, *[widths[index]] * (config.num_blocks + 1)),
                    norm,
                    attend=index in config.attention_levels,
                    resample=Upsample(widths[index], config.resampling) if index > 0 else None,
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
        h = self.conv_in(z)
        if self.config.resampling == "dc":
            h = h + z.repeat_interleave(h.shape[1] // z.shape[1], dim=1)
        if self.middle is not None:
            h = self.middle(h, context)
        for level in self.levels:
            for block in level:  # type: ignore[attr-defined]
                h = block(h, context)
        h = silu(self.norm_out(h, context))
        image = F.pixel_shuffle(self.conv_out(h), self.config.head_patch)
        if self.linear is not None:
            image = image + F.pixel_shuffle(self.linear(z), self.config.factor)
        return deblock(image, self.config.factor, self.config.deblock) if self.config.deblock else image


def _norm_factory(config: PixelDecoderConfig) -> NormFactory:
    context_channels = config.context_channels
    if context_channels is None:
        return lambda channels: GroupNorm(channels, config.num_groups)
    return lambda channels: SpatialNorm(channels, context_channels, config.num_groups)
