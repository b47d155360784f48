"""Position tables on another grid than the one they were learned on."""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor


def resize_positions(
    table: Float[Tensor, "one n d"], trained: tuple[int, int], grid: tuple[int, int], nudge: float = 0.1
) -> Float[Tensor, "one m d"]:
    """Bicubic interpolation of a learned table whose leading rows that lie on no grid (class token) stay as they are.

    The coordinates are scaled by (size + nudge) / trained and not by size / trained, as in DINO (arXiv 2104.14294:
    `interpolate_pos_encoding`) and the models that took this from it; tables on the new grid differ a lot otherwise.
    """
    rows, columns = trained
    extra = table.shape[1] - rows * columns
    head, body = table[:, :extra], table[:, extra:].unflatten(1, trained).permute(0, 3, 1, 2)
    scale = [(new + nudge) / old for new, old in zip(grid, trained, strict=True)]
    body = F.interpolate(body, scale_factor=scale, mode="bicubic", align_corners=False)
    return torch.cat([head, body.permute(0, 2, 3, 1).flatten(1, 2)], dim=1)


def bilinear_positions(
    table: Float[Tensor, "one n d"], trained: tuple[int, int], grid: tuple[int, int]
) -> Float[Tensor, "one m d"]:
    """Bilinear interpolation (half-pixel centres, no antialiasing) of a learned table; the same grid returns it as is.

    Leading rows that lie on no grid (MAR's buffers) stay as they are.
    """
    if grid == trained:
        return table
    extra = table.shape[1] - trained[0] * trained[1]
    body = table[:, extra:].unflatten(1, trained).permute(0, 3, 1, 2)
    body = F.interpolate(body, size=grid, mode="bilinear", align_corners=False)
    return torch.cat([table[:, :extra], body.permute(0, 2, 3, 1).flatten(1, 2)], dim=1)
