"""Residual quantization over scales: how features go down to a scale and codes come up again (TokenFlow, VAR)."""

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

Grid = tuple[int, int]


def area_down(x: Float[Tensor, "b h w d"], grid: Grid) -> Float[Tensor, "b r c d"]:
    """Mean over the area of each cell of the smaller grid (adaptive average pooling)."""
    if x.shape[1:3] == grid:
        return x
    return F.interpolate(x.permute(0, 3, 1, 2), size=grid, mode="area").permute(0, 2, 3, 1)


def bicubic_up(x: Float[Tensor, "b r c d"], grid: Grid) -> Float[Tensor, "b h w d"]:
    """Bicubic interpolation (a = -0.75, half-pixel centres, no antialiasing); the identity on the grid itself."""
    if x.shape[1:3] == grid:
        return x
    up = F.interpolate(x.permute(0, 3, 1, 2), size=grid, mode="bicubic", align_corners=False)
    return up.permute(0, 2, 3, 1)
