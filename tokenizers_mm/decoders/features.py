"""Feature decoders: quantized vectors back to a tower's features, on the same grid."""

from dataclasses import dataclass
from typing import Annotated, Literal

import torch.nn.functional as F
from torch import Tensor, nn

from tokenizers_mm.config import Heads, MLPRatio, Range, Width, checked
from tokenizers_mm.layers.rotary import RotaryTransformer, RotaryTransformerConfig


@dataclass(frozen=True)
class ConvFeatureConfig:
    """A pointwise map and `depth` residual blocks of two 3x3 convolutions with GELU (X-Omni); 0: the map alone."""

    depth: Annotated[int, Range(0, 64)] = 2
    num_groups: Width = 32
    kind: Literal["conv"] = "conv"


class ConvFeatureDecoder(nn.Module):
    """z [B, h, w, D] -> features [B, h, w, C]."""

    Config = ConvFeatureConfig

    def __init__(self, in_dim: int, out_dim: int, config: ConvFeatureConfig) -> None:
        super().__init__()
        self.config = config = checked(config)
        self.embed = nn.Conv2d(in_dim, out_dim, 1)
        self.blocks = nn.ModuleList(_Residual(out_dim, config.num_groups) for _ in range(config.depth))

    @property
    def last_layer(self) -> nn.Parameter:
        """Weight of the last layer."""
        last = self.blocks[-1].conv2 if len(self.blocks) else self.embed
        return last.weight  # type: ignore[return-value]

    def forward(self, z: Tensor) -> Tensor:
        h = self.embed(z.permute(0, 3, 1, 2))
        for block in self.blocks:
            h = block(h)
        return h.permute(0, 2, 3, 1)


class _Residual(nn.Module):
    """Norm, GELU, 3x3 convolution, twice, plus the input."""

    def __init__(self, channels: int, num_groups: int) -> None:
        super().__init__()
        self.norm1 = nn.GroupNorm(num_groups, channels)
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1)
        self.norm2 = nn.GroupNorm(num_groups, channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv2(F.gelu(self.norm2(self.conv1(F.gelu(self.norm1(x))))))


@dataclass(frozen=True)
class TransformerFeatureConfig:
    """A small transformer with rotary positions (see `RotaryTransformerConfig`)."""

    width: Width = 1280
    depth: Annotated[int, Range(1, 256)] = 4
    heads: Heads = 16
    mlp_ratio: MLPRatio = 4.0
    kind: Literal["transformer"] = "transformer"

    def check(self) -> None:
        """Refuse sizes that no block has."""
        self.transformer.check()

    @property
    def transformer(self) -> RotaryTransformerConfig:
        """Configuration of the transformer."""
        return RotaryTransformerConfig(self.width, self.depth, self.heads, self.mlp_ratio, "norm_linear")


class TransformerFeatureDecoder(RotaryTransformer):
    """z [B, h, w, D] -> features [B, h, w, C]."""

    Config = TransformerFeatureConfig

    def __init__(self, in_dim: int, out_dim: int, config: TransformerFeatureConfig) -> None:
        super().__init__(in_dim, out_dim, config.transformer)

    @property
    def last_layer(self) -> nn.Parameter:
        """Weight of the last layer."""
        return self.project[-1].weight  # type: ignore[return-value]
