"""Positions of tokens on a grid: rotary embedding over two axes (RoFormer, arXiv 2104.09864; Qwen2-VL, arXiv
2409.12191, section 2.1)."""

from collections.abc import Callable

import torch
from torch import Tensor

from tokenizers_mm.functional.precision import at_least_float32

Rotate = Callable[[Tensor], Tensor]


def grid_positions(rows: int, columns: int, block: int = 1, device: torch.device | None = None) -> Tensor:
    """Row and column of every cell, [rows * columns, 2].

    In raster order for block 1; else square blocks of that side follow each other in raster order, and so do the cells
    inside each block.
    """
    row = torch.arange(rows, device=device)[:, None].expand(rows, columns)
    column = torch.arange(columns, device=device)[None].expand(rows, columns)
    return block_order(torch.stack([row, column], -1), block)


def block_order(x: Tensor, block: int) -> Tensor:
    """Cells [..., rows, columns, C] as a list [..., rows * columns, C], blocks of block x block cells kept together."""
    if block == 1:
        return x.flatten(-3, -2)
    blocks = x.unflatten(-2, (-1, block)).unflatten(-4, (-1, block)).transpose(-4, -3)
    return blocks.flatten(-5, -2)


def rotary_2d(positions: Tensor, dim: int, theta: float = 10000.0) -> Rotate:
    """A function that turns heads [B, heads, N, dim] by their positions [N, 2]: half the frequencies for each axis.

    Channel i is paired with channel i + dim / 2. The angles are computed in float64, which gives the same table on
    every instruction set; the rotation is done in float32 (float64 for heads in float64), the dtype is kept.
    """
    frequencies = theta ** -(torch.arange(0, dim // 2, 2, device=positions.device, dtype=torch.float64) / (dim // 2))
    angles = (positions.double()[:, :, None] * frequencies).flatten(1)
    exact = [torch.cat([table, table], -1) for table in (angles.cos(), angles.sin())]
    tables: dict[torch.dtype, list[Tensor]] = {}

    def rotate(x: Tensor) -> Tensor:
        wide = at_least_float32(x)
        if wide.dtype not in tables:
            tables[wide.dtype] = [table.to(wide.dtype) for table in exact]
        cos, sin = tables[wide.dtype]
        first, second = wide.chunk(2, dim=-1)
        return (wide * cos + torch.cat([-second, first], -1) * sin).to(x.dtype)

    return rotate
