"""Learned position tables at other grids than the one they were learned on."""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

Grid = tuple[int, int]


def resize_positions(
    table: Float[Tensor, "1 n c"], native: Grid, grid: Grid, num_prefix: int = 0
) -> Float[Tensor, "1 m c"]:
    """A table of `num_prefix` rows and then native[0] * native[1] row-major ones, brought to another grid.

    Bilinear, half-pixel centres, no antialiasing; prefix rows and the native grid stay as they are.
    """
    if grid == native:
        return table
    prefix, rest = table[:, :num_prefix], table[:, num_prefix:]
    picture = rest.unflatten(1, native).permute(0, 3, 1, 2)
    resized = F.interpolate(picture, size=grid, mode="bilinear", align_corners=False)
    return torch.cat([prefix, resized.flatten(2).transpose(1, 2)], dim=1)
