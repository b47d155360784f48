"""Normalisations of the convolutional networks. All take (x, context), so that a block need not know which it has."""

import torch.nn.functional as F
from torch import Tensor, nn


class GroupNorm(nn.GroupNorm):
    """Group normalisation with eps 1e-6; the context is not used."""

    def __init__(self, channels: int, num_groups: int = 32) -> None:
        super().__init__(num_groups, channels, eps=1e-6)

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:  # type: ignore[override]
        return super().forward(x)


class SpatialNorm(nn.Module):
    """Group normalisation whose scale and shift are 1x1 convolutions of the codes (MoVQ, arXiv 2209.09002, eq. 5)."""

    def __init__(self, channels: int, context_channels: int, num_groups: int = 32) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(num_groups, channels, eps=1e-6)
        self.scale = nn.Conv2d(context_channels, channels, 1)
        self.shift = nn.Conv2d(context_channels, channels, 1)

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        context = F.interpolate(context, size=x.shape[-2:], mode="nearest")
        return self.norm(x) * self.scale(context) + self.shift(context)
