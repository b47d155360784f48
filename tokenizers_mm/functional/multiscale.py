"""Residual quantization over scales: how features go down to a scale and codes come up again.

Sources: Tian et al., Visual Autoregressive Modeling (VAR, arXiv 2404.02905), section 3.2; Han et al., Infinity
(arXiv 2412.04431), sections 3.2 and 3.4.
"""

from typing import Literal

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

Grid = tuple[int, int]

Upsampling = Literal["bicubic", "bilinear"]
"""Infinity's trilinear interpolation over one frame is bilinear."""


def area_down(x: Float[Tensor, "b h w d"], grid: Grid) -> Float[Tensor, "b r c d"]:
    """Mean over the area of each cell of the smaller grid (adaptive average pooling)."""
    if x.shape[1:3] == grid:
        return x
    return F.interpolate(x.permute(0, 3, 1, 2), size=grid, mode="area").permute(0, 2, 3, 1)


def bicubic_up(x: Float[Tensor, "b r c d"], grid: Grid) -> Float[Tensor, "b h w d"]:
    """Bicubic interpolation (a = -0.75, half-pixel centres, no antialiasing); the identity on the grid itself."""
    return upsample(x, grid, "bicubic")


def upsample(x: Float[Tensor, "b r c d"], grid: Grid, mode: Upsampling) -> Float[Tensor, "b h w d"]:
    """Interpolation to a larger grid, half-pixel centres, no antialiasing; the identity on the grid itself."""
    if x.shape[1:3] == grid:
        return x
    return F.interpolate(x.permute(0, 3, 1, 2), size=grid, mode=mode, align_corners=False).permute(0, 2, 3, 1)


def nearest_tick(place: float, count: int) -> int:
    """Index of the block, of `count`, that serves the scale at `place` in [0, 1]: the nearest tick, the first of two.

    Ticks lie at equal distances from 1 / (3 count) to 1 - 1 / (3 count) for four blocks, else from 1 / (2 count) (VAR).
    """
    first = 1 / (3 if count == 4 else 2) / count
    step = (1 - first - first) / max(1, count - 1)
    distances = [abs(i * step + first - place) for i in range(count)]
    return distances.index(min(distances))
