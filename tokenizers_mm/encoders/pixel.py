"""Convolutional pixel encoder, image to features: VQGAN's, TokenFlow's, DualViTok's (MoVQ), the KL-16 autoencoder's,
and those of the MAGVIT-v2 reimplementations and of Infinity."""

from dataclasses import dataclass
from typing import Literal

from torch import Tensor, nn

from tokenizers_mm._check import require
from tokenizers_mm.config import Width, checked
from tokenizers_mm.layers.conv import (
    ATTENTION_LEVELS,
    AttentionLevels,
    Downsample,
    Level,
    Middle,
    MiddleBlocks,
    Multipliers,
    NumBlocks,
    Patch,
    Resampling,
    StillBlocks,
    blocks_per_level,
    check_levels,
    check_widths,
    silu,
)
from tokenizers_mm.layers.norm import GroupNorm
from tokenizers_mm.layers.still import StillEncoder


@dataclass(frozen=True)
class PixelEncoderConfig:
    """Sizes of the encoder; the factor is `stem_patch * 2 ** (len(multipliers) - 1)`.

    stem_patch: 1 starts with a 3x3 convolution; p > 1 with a p x p convolution of stride p, for small machines.
    num_blocks: residual blocks of every level, or of each one, from fine to coarse.
    attention_levels: indices of levels (0 is the finest) with attention after each residual block.
    middle: whether there are blocks between the last level and the output: `middle_blocks` of them, with attention
        after the first one where `middle_attention` says so.
    resampling: "dc" adds DC-AE shortcuts at every change of size and at the output.
    bias: of the first convolution and of those in residual blocks. out_kernel: side of the last convolution.
    still_blocks: residual blocks of temporal layers behind it (see `layers.still`); 0: no such layers.
    linear: a linear map of every factor x factor patch, which a training run can start from principal components:
        "none", "beside" the network (their sum), or "alone".
    """

    out_channels: Width
    channels: Width = 128
    multipliers: Multipliers = (1, 1, 2, 2, 4)
    num_blocks: NumBlocks = 2
    attention_levels: AttentionLevels = ATTENTION_LEVELS
    middle: bool = True
    stem_patch: Patch = 1
    resampling: Resampling = "conv"
    num_groups: Width = 32
    linear: Literal["none", "beside", "alone"] = "none"
    middle_blocks: MiddleBlocks = 2
    middle_attention: bool = True
    bias: bool = True
    out_kernel: Literal[1, 3] = 3
    still_blocks: StillBlocks = 0
    kind: Literal["cnn"] = "cnn"

    @property
    def factor(self) -> int:
        """Pixels per cell and side."""
        return self.stem_patch * 2 ** (len(self.multipliers) - 1)

    def check(self) -> None:
        """Refuse widths that do not go together."""
        check_widths(self.channels, self.multipliers, self.num_groups, self.resampling)
        if self.linear != "alone":
            check_levels(self.num_blocks, self.attention_levels, len(self.multipliers))
        last = self.channels * self.multipliers[-1]
        if self.resampling == "dc":
            require(last % self.out_channels == 0, "out_channels", f"a divisor of {last}", self.out_channels)


class PixelEncoder(nn.Module):
    """x [B, 3, H, W] in [-1, 1] -> features [B, C, H / factor, W / factor]."""

    Config = PixelEncoderConfig

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
            self.conv_in = nn.Conv2d(3, config.channels, 3, padding=1, bias=config.bias)
        else:
            self.conv_in = nn.Conv2d(3, config.channels, patch, stride=patch, bias=config.bias)
        widths = [config.channels * m for m in config.multipliers]
        counts = blocks_per_level(config.num_blocks, len(widths))
        self.levels = nn.ModuleList()
        width = config.channels
        for index, level_width in enumerate(widths):
            last = index == len(widths) - 1
            self.levels.append(
                Level(
                    (width, *[level_width] * counts[index]),
                    norm,
                    attend=index in config.attention_levels,
                    resample=None if last else Downsample(level_width, config.resampling),
                    bias=config.bias,
                )
            )
            width = level_width
        self.middle = nn.Identity()
        if config.middle:
            self.middle = Middle(width, norm, config.middle_attention, config.middle_blocks, config.bias)
        self.norm_out = norm(width)
        self.conv_out = nn.Conv2d(width, config.out_channels, config.out_kernel, padding=config.out_kernel // 2)
        self.still = StillEncoder(config.out_channels, config.still_blocks) if config.still_blocks else None
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
        out = out if self.still is None else self.still(out)
        return out if self.linear is None else out + self.linear(x)
