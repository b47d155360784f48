"""Convolutional pixel encoder, image to features: TokenFlow's, DualViTok's (MoVQ) and the KL-16 autoencoder's."""

from dataclasses import dataclass
from typing import Literal

from torch import Tensor, nn

from tokenizers_mm._check import require
from tokenizers_mm.config import Width, checked
from tokenizers_mm.layers.conv import (
    AttentionLevels,
    Downsample,
    Level,
    Middle,
    Multipliers,
    NumBlocks,
    Patch,
    Resampling,
    check_widths,
    silu,
)
from tokenizers_mm.layers.norm import GroupNorm


@dataclass(frozen=True)
class PixelEncoderConfig:
    """Sizes of the encoder; the factor is `stem_patch * 2 ** (len(multipliers) - 1)`.

    stem_patch: 1 starts with a 3x3 convolution; p > 1 with a p x p convolution of stride p, for small machines.
    attention_levels: indices of levels (0 is the finest) with attention after each residual block.
    resampling: "dc" adds DC-AE shortcuts at every change of size and at the output.
    linear: a linear map of every factor x factor patch, which a training run can start from principal components:
        "none", "beside" the network (their sum), or "alone".
    """

    out_channels: Width
    channels: Width = 128
    multipliers: Multipliers = (1, 1, 2, 2, 4)
    num_blocks: NumBlocks = 2
    attention_levels: AttentionLevels = (4,)
    middle: bool = True
    stem_patch: Patch = 1
    resampling: Resampling = "conv"
    num_groups: Width = 32
    linear: Literal["none", "beside", "alone"] = "none"

    @property
    def factor(self) -> int:
        """Pixels per cell and side."""
        return self.stem_patch * 2 ** (len(self.multipliers) - 1)

    def check(self) -> None:
        """Refuse widths that do not go together."""
        check_widths(self.channels, self.multipliers, self.num_groups, self.resampling)
        last = self.channels * self.multipliers[-1]
        if self.resampling == "dc":
            require(last % self.out_channels == 0, "out_channels", f"a divisor of {last}", self.out_channels)


class PixelEncoder(nn.Module):
    """x [B, 3, H, W] in [-1, 1] -> features [B, C, H / factor, W / factor]."""

    def __init__(self, config: PixelEncoderConfig) -> None:
        super().__init__()
        self.config = config = checked(config)
        self.factor = config.factor
        self.linear = None
        if config.linear != "none":
            self.linear = nn.Conv2d(3, config.out_channels, self.factor, stride=self.factor)
        if config.linear == "alone":
            return

        def norm(channels: int) -> nn.Module:
            return GroupNorm(channels, config.num_groups)

        patch = config.stem_patch
        if patch == 1:
            self.conv_in = nn.Conv2d(3, config.channels, 3, padding=1)
        else:
            self.conv_in = nn.Conv2d(3, config.channels, patch, stride=patch)
        widths = [config.channels * m for m in config.multipliers]
        self.levels = nn.ModuleList()
        width = config.channels
        for index, level_width in enumerate(widths):
            last = index == len(widths) - 1
            self.levels.append(
                Level(
                    (width, *[level_width] * config.num_blocks),
                    norm,
                    attend=index in config.attention_levels,
                    resample=None if last else Downsample(level_width, config.resampling),
                )
            )
            width = level_width
        self.middle = Middle(width, norm) if config.middle else nn.Identity()
        self.norm_out = norm(width)
        self.conv_out = nn.Conv2d(width, config.out_channels, 3, padding=1)
        if config.linear == "beside":
            for parameter in self.conv_out.parameters():
                nn.init.zeros_(parameter)

    def forward(self, x: Tensor) -> Tensor:
        x = x.contiguous()  # over channels-last tensors the CPU's group norm loses two digits
        if self.linear is not None and self.config.linear == "alone":
            return self.linear(x)
        h = self.conv_in(x)
        for level in self.levels:
            for block in level:  # type: ignore[attr-defined]
                h = block(h)
        h = silu(self.norm_out(self.middle(h)))
        if self.config.resampling == "dc":
            out = self.conv_out(h) + h.unflatten(1, (self.config.out_channels, -1)).mean(2)
        else:
            out = self.conv_out(h)
        return out if self.linear is None else out + self.linear(x)
