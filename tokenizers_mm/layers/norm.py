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


class StatisticsNorm(nn.Module):
    """Group normalisation whose scale and shift are linear maps of the standard deviation and the mean of the codes
    [B, C, h, w] over all positions (the adaptive norm of Open-MAGVIT2, arXiv 2409.04410)."""

    EPS = 1e-6
    """Added to the variances of features and codes."""

    def __init__(self, channels: int, context_channels: int, num_groups: int = 32) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(num_groups, channels, eps=self.EPS, affine=False)
        self.scale = nn.Linear(context_channels, channels)
        self.shift = nn.Linear(context_channels, channels)

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        flat = context.flatten(2)
        deviation = (flat.var(-1, correction=min(1, flat.shape[-1] - 1)) + self.EPS).sqrt()
        scale, shift = self.scale(deviation), self.shift(flat.mean(-1))
        return self.norm(x) * scale[..., None, None] + shift[..., None, None]


class BatchNorm(nn.BatchNorm2d):
    """Batch normalisation with eps 1e-5; the context is not used."""

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:  # type: ignore[override]
        return super().forward(x)
