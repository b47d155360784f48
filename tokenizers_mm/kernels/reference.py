"""The definition of each kernel in plain torch: the fallback, the oracle of the tests, the baseline of the benchmarks.

Exactness: the result is that of the squared distance `sum((z - c)^2)` in float64, the lowest index on ties. A matrix
product in float64 finds the candidates; those within its rounding error are compared in the difference form.
"""

import torch
from torch import Tensor

TILE_ELEMENTS = 1 << 20
"""Scores (float64) held at a time: 8 MB. No N x K matrix is ever made."""

BAND = 1e-13
"""Rounding of the float64 product form, relative to the squared norms, per sqrt(D)."""


def nearest_code(z: Tensor, codebook: Tensor) -> tuple[Tensor, Tensor]:
    """Index of the nearest code and its squared distance.

    z [N, D] and codebook [K, D], any float dtypes; returns int64 [N] and float64 [N]. A code that holds NaN or infinity
    is never chosen. A query that holds one gets index 0 and a NaN distance.
    """
    z, codebook = z.double(), codebook.double()
    usable = torch.isfinite(codebook).all(1)
    centre = codebook[usable].mean(0) if bool(usable.any()) else codebook.new_zeros(codebook.shape[1])
    codes = torch.where(usable[:, None], codebook - centre, 0.0)
    rows = max(1, TILE_ELEMENTS // max(1, codebook.shape[0]))
    ids = torch.zeros(z.shape[0], dtype=torch.int64, device=z.device)
    distances = torch.full((z.shape[0],), torch.nan, dtype=torch.float64, device=z.device)
    for start in range(0, z.shape[0], rows):
        tile = slice(start, start + rows)
        ids[tile], distances[tile] = _nearest_in_tile(z[tile] - centre, codes, usable)
    return ids, distances


def code_sums(vectors: Tensor, ids: Tensor, num_codes: int) -> tuple[Tensor, Tensor]:
    """How often each code was used and the sum of the vectors given to it.

    vectors [N, D], ids int64 [N]; returns int64 [K] and float64 [K, D]. Sorted by code first, so that every sum is
    added in the order of the rows: the same bits on every run.
    """
    counts = torch.bincount(ids, minlength=num_codes)
    order = torch.argsort(ids, stable=True)
    sums = vectors.new_zeros((num_codes, vectors.shape[1]), dtype=torch.float64)
    present = counts > 0
    if bool(present.any()):
        sums[present] = torch.segment_reduce(vectors[order].double(), "sum", lengths=counts[present], axis=0)
    return counts, sums


def _nearest_in_tile(z: Tensor, codes: Tensor, usable: Tensor) -> tuple[Tensor, Tensor]:
    norms = torch.where(usable, codes.square().sum(1), torch.inf)
    scores = torch.addmm(norms[None], z, codes.T, alpha=-2.0)
    best, ids = scores.min(1)
    scale = z.square().sum(1) + torch.where(usable, norms, 0.0).max()
    near = scores <= (best + BAND * z.shape[1] ** 0.5 * scale)[:, None]
    rows, candidates = near.nonzero(as_tuple=True)
    distances = torch.empty(rows.shape, dtype=torch.float64, device=z.device)
    step = max(1, TILE_ELEMENTS // z.shape[1])
    for start in range(0, rows.shape[0], step):
        part = slice(start, start + step)
        distances[part] = (z[rows[part]] - codes[candidates[part]]).square().sum(1)
    least = torch.full_like(best, torch.inf).scatter_reduce_(0, rows, distances, "amin")
    chosen = torch.where(distances == least[rows], candidates, codes.shape[0])
    ids = torch.full_like(ids, codes.shape[0]).scatter_reduce_(0, rows, chosen, "amin")
    found = (ids < codes.shape[0]) & torch.isfinite(z).all(1)
    return torch.where(found, ids, 0), torch.where(found, least, torch.nan)
