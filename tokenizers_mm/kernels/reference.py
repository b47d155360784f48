"""The definition of each kernel in plain torch: the fallback, the oracle of the tests, the baseline of the benchmarks.

Exactness: the result is that of the squared distance `sum((z - c)^2)` in float64, the lowest index on ties. A matrix
product in float64 finds the candidates; those within its rounding error are compared in the difference form.
"""

import torch
from torch import Tensor

TILE_ELEMENTS = 1 << 20
"""Scores (float64) held at a time: 8 MB. No N x K matrix is ever made."""

BAND = 4e-16
"""Rounding of the float64 product form, relative to the squared norms, per D + 8 operations: two units and more."""


def nearest_code(z: Tensor, codebook: Tensor) -> tuple[Tensor, Tensor]:
    """Index of the nearest code and its squared distance.

    z [N, D] and codebook [K, D], any float dtypes; returns int64 [N] and float64 [N]. A code that holds NaN or infinity
    is never chosen. A query without a finite distance gets index 0 and a NaN distance. Source: the definition.
    """
    codebook = codebook.double()
    usable = torch.isfinite(codebook).all(1)
    safe = torch.where(usable[:, None], codebook, 0.0)
    centre = safe.sum(0) / usable.sum().clamp_min(1)
    codes = torch.where(usable[:, None], codebook - centre, 0.0)
    norms = torch.where(usable, codes.square().sum(1), torch.inf)
    rows = max(1, TILE_ELEMENTS // max(codebook.shape))
    ids = torch.zeros(z.shape[0], dtype=torch.int64, device=z.device)
    distances = torch.full((z.shape[0],), torch.nan, dtype=torch.float64, device=z.device)
    for start in range(0, z.shape[0], rows):
        tile = slice(start, start + rows)
        query = z[tile].double()
        scores = torch.addmm(norms[None], query - centre, codes.T, alpha=-2.0)
        size = (query - centre).square().sum(1) + torch.where(usable, norms, 0.0).max()
        band = scores.min(1).values + BAND * (codebook.shape[1] + 8) * size
        near = (scores <= band[:, None]) | ~torch.isfinite(band)[:, None]
        ids[tile], distances[tile] = _decide(query, safe, near & usable)
    return ids, distances


def _decide(query: Tensor, codes: Tensor, near: Tensor) -> tuple[Tensor, Tensor]:
    """Lexicographic minimum of (squared distance, index) over the candidates `near` [N, K]."""
    rows, candidates = near.nonzero(as_tuple=True)
    distances = torch.empty(rows.shape, dtype=torch.float64, device=query.device)
    step = max(1, TILE_ELEMENTS // query.shape[1])
    for start in range(0, rows.shape[0], step):
        part = slice(start, start + step)
        distances[part] = (query[rows[part]] - codes[candidates[part]]).square().sum(1)
    distances = torch.where(torch.isfinite(distances), distances, torch.inf)
    least = distances.new_full((query.shape[0],), torch.inf).scatter_reduce_(0, rows, distances, "amin")
    chosen = torch.where((distances == least[rows]) & torch.isfinite(distances), candidates, codes.shape[0])
    ids = candidates.new_full((query.shape[0],), codes.shape[0]).scatter_reduce_(0, rows, chosen, "amin")
    found = ids < codes.shape[0]
    return torch.where(found, ids, 0), torch.where(found, least, torch.nan)


def code_sums(vectors: Tensor, ids: Tensor, num_codes: int) -> tuple[Tensor, Tensor]:
    """How often each code was used and the sum of the vectors given to it.

    vectors [N, D], ids int64 [N]; returns int64 [K] and float64 [K, D]. Sorted by code first, so that every sum is
    added in the order of the rows: the same bits on every run. Source: the definition.
    """
    counts = torch.bincount(ids, minlength=num_codes)
    order = torch.argsort(ids, stable=True)
    sums = vectors.new_zeros((num_codes, vectors.shape[1]), dtype=torch.float64)
    present = counts > 0
    if bool(present.any()):
        sums[present] = torch.segment_reduce(vectors[order].double(), "sum", lengths=counts[present], axis=0)
    return counts, sums
