"""Operations that also exist in C++ and CUDA. Each is exact, and none of them holds an N x K matrix."""

import torch
import torch.nn.functional as F
from torch import Tensor

from tokenizers_mm._check import require
from tokenizers_mm.kernels import reference


@torch.library.custom_op("tokenizers_mm::nearest_code", mutates_args=())
def _nearest_code(z: Tensor, codebook: Tensor) -> Tensor:
    return reference.nearest_code(z, codebook)[0]


@_nearest_code.register_fake
def _(z: Tensor, codebook: Tensor) -> Tensor:
    return z.new_empty((z.shape[0],), dtype=torch.int64)


def nearest_code(z: Tensor, codebook: Tensor) -> Tensor:
    """Index of the nearest code in squared L2 distance: z [..., D], codebook [K, D] -> int64 [...]."""
    require(
        codebook.ndim == 2 and codebook.shape[0] > 0 and codebook.shape[1] > 0,
        "codebook",
        "[K, D], K and D >= 1",
        codebook,
    )
    require(z.ndim > 0 and z.shape[-1] == codebook.shape[1], "z", f"[..., {codebook.shape[1]}]", z)
    return _nearest_code(z.detach().reshape(-1, z.shape[-1]), codebook.detach()).reshape(z.shape[:-1])


def nearest_code_shared(
    zs: tuple[Tensor, ...],
    codebooks: tuple[Tensor, ...],
    weights: tuple[float, ...] = (1.0, 1.0),
    *,
    normalize: bool = False,
) -> Tensor:
    """One index for several codebooks: argmin_k of sum_i weights[i] * ||zs[i] - codebooks[i][k]||^2, int64 [...].

    zs[i] is [..., D_i] and codebooks[i] is [K, D_i]. `normalize` divides every row by its L2 norm first.
    """
    require(len(zs) == len(codebooks) == len(weights), "zs", "as many parts as codebooks and weights", len(zs))
    if normalize:
        zs, codebooks = tuple(F.normalize(z, dim=-1) for z in zs), tuple(F.normalize(c, dim=-1) for c in codebooks)
    z = torch.cat([part.double() * weight**0.5 for part, weight in zip(zs, weights, strict=True)], -1)
    codebook = torch.cat([part.double() * weight**0.5 for part, weight in zip(codebooks, weights, strict=True)], -1)
    return nearest_code(z, codebook)


def code_sums(vectors: Tensor, ids: Tensor, num_codes: int) -> tuple[Tensor, Tensor]:
    """Counts int64 [K] and vector sums float64 [K, D] per code, deterministic. vectors [N, D], ids int64 [N]."""
    return reference.code_sums(vectors, ids, num_codes)
