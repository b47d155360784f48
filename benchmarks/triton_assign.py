"""Nearest code in Triton, in the manner of flash attention: a peer for the GPU benchmark, not exact.

One program holds a block of tokens and streams all codes past it, keeping the least ||c||^2 - 2 z.c and its index; no
N x K matrix. float16 inputs are multiplied as they are; float32 ones by "tf32x3", three tensor-core products for each.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _assign(
    z_ptr,
    c_ptr,
    norm_ptr,
    id_ptr,
    n,
    k,
    D: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PRECISION: tl.constexpr,
):
    rows = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    cols = tl.arange(0, BLOCK_D)
    z_rows = z_ptr + rows[:, None].to(tl.int64) * D
    best = tl.full((BLOCK_N,), float("inf"), tl.float32)
    best_id = tl.zeros((BLOCK_N,), tl.int32)
    if D <= BLOCK_D:
        z = tl.load(z_rows + cols[None, :], mask=(rows[:, None] < n) & (cols[None, :] < D), other=0.0)
    for start in range(0, k, BLOCK_K):
        codes = start + tl.arange(0, BLOCK_K)
        c_rows = c_ptr + codes[None, :].to(tl.int64) * D
        norms = tl.load(norm_ptr + codes, mask=codes < k, other=float("inf"))
        if D <= BLOCK_D:
            c = tl.load(c_rows + cols[:, None], mask=(codes[None, :] < k) & (cols[:, None] < D), other=0.0)
            product = tl.dot(z, c, input_precision=PRECISION)
        else:
            product = tl.zeros((BLOCK_N, BLOCK_K), tl.float32)
            for first in range(0, D, BLOCK_D):
                at = first + cols
                z = tl.load(z_rows + at[None, :], mask=(rows[:, None] < n) & (at[None, :] < D), other=0.0)
                c = tl.load(c_rows + at[:, None], mask=(codes[None, :] < k) & (at[:, None] < D), other=0.0)
                product = tl.dot(z, c, product, input_precision=PRECISION)
        scores = norms[None, :] - 2.0 * product
        least = tl.min(scores, 1)
        found = start + tl.argmin(scores, 1)
        better = least < best
        best = tl.where(better, least, best)
        best_id = tl.where(better, found, best_id)
    tl.store(id_ptr + rows, best_id, mask=rows < n)


@dataclass(frozen=True)
class Shape:
    """Shape of the blocks of a program."""

    block_n: int
    block_k: int
    block_d: int
    warps: int
    stages: int


HALF_SHAPES = (Shape(128, 128, 128, 4, 3), Shape(128, 128, 64, 8, 3), Shape(128, 64, 64, 4, 4))
FLOAT_SHAPES = (Shape(64, 64, 32, 4, 3), Shape(128, 64, 32, 8, 2))


def shapes(z: Tensor) -> tuple[Shape, ...]:
    """Candidates to choose from by measuring."""
    return HALF_SHAPES if z.dtype == torch.float16 else FLOAT_SHAPES


def assign(z: Tensor, c: Tensor, shape: Shape) -> Tensor:
    """Index of the nearest code, int32 [N], of z [N, D] and c [K, D], both contiguous, float16 or float32."""
    n, dim = z.shape
    ids = torch.empty(n, dtype=torch.int32, device=z.device)
    block_d = min(shape.block_d, max(16, triton.next_power_of_2(dim)))
    _assign[(triton.cdiv(n, shape.block_n),)](
        z,
        c,
        c.float().square().sum(1),
        ids,
        n,
        len(c),
        D=dim,
        BLOCK_N=shape.block_n,
        BLOCK_K=shape.block_k,
        BLOCK_D=block_d,
        PRECISION="ieee" if z.dtype == torch.float16 else "tf32x3",
        num_warps=shape.warps,  # pyright: ignore[reportCallIssue]
        num_stages=shape.stages,  # pyright: ignore[reportCallIssue]
    )
    return ids
