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
    is never chosen; a query that does gets index -1 and a NaN distance. A finite query without a finite distance
    (overflow) gets index 0 and an infinite distance. Source: the definition.
    """
    ids, distances, _ = _search(z, codebook, margins=False)
    return ids, distances


def nearest_code_margin(z: Tensor, codebook: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """As `nearest_code`, and the margin, float64 [N]: how much farther, not squared, the nearest code of another value
    is. Infinity where all codes are equal, zero where distances overflow, NaN for a query that is not finite.
    """
    ids, distances, others = _search(z, codebook, margins=True)
    return ids, distances, margin_of(distances, others)


def margin_of(nearest: Tensor, other: Tensor) -> Tensor:
    """The difference of two distances from their squares, which does not cancel twice; zero where both overflow."""
    margin = torch.where(torch.isfinite(other), (other - nearest) / (other.sqrt() + nearest.sqrt()), torch.inf)
    margin = torch.where(other > nearest, margin, 0.0)
    return torch.where(nearest.isnan(), torch.nan, margin)


def _search(z: Tensor, codebook: Tensor, margins: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Index, squared distance, and with `margins` the squared distance of the nearest code of another value."""
    codebook = codebook.double()
    usable = torch.isfinite(codebook).all(1)
    safe = torch.where(usable[:, None], codebook, 0.0)
    centre = safe.sum(0) / usable.sum().clamp_min(1)
    codes = torch.where(usable[:, None], codebook - centre, 0.0)
    norms = torch.where(usable, codes.square().sum(1), torch.inf)
    size_of_codes = torch.where(usable, norms, 0.0).max()
    value = _first_equal(safe) if margins else torch.empty(0)
    rows = max(1, TILE_ELEMENTS // max(codebook.shape))
    ids = torch.zeros(z.shape[0], dtype=torch.int64, device=z.device)
    distances = torch.full((z.shape[0],), torch.inf, dtype=torch.float64, device=z.device)
    others = distances.clone()
    for start in range(0, z.shape[0], rows):
        tile = slice(start, start + rows)
        query = z[tile].double()
        scores = torch.addmm(norms[None], query - centre, codes.T, alpha=-2.0)
        scores = torch.where(torch.isfinite(scores) | ~usable, scores, -torch.inf)  # overflow: compare in full
        rounding = BAND * (codebook.shape[1] + 8) * ((query - centre).square().sum(1) + size_of_codes)
        ids[tile], distances[tile] = _decide(query, safe, _within(scores, rounding) & usable)
        if margins:
            other = usable & (value != value[ids[tile]][:, None])
            near = _within(torch.where(other, scores, torch.inf), rounding) & other
            others[tile] = _decide(query, safe, near)[1]
    finite = torch.isfinite(z).all(1)
    return torch.where(finite, ids, -1), torch.where(finite, distances, torch.nan), others


def _within(scores: Tensor, rounding: Tensor) -> Tensor:
    """The codes that rounding does not rule out as the least of `scores` [N, K]."""
    band = scores.min(1).values + rounding
    return (scores <= band[:, None]) | ~torch.isfinite(band)[:, None]


def _first_equal(codes: Tensor) -> Tensor:
    """A number for every row that equal rows share, int64 [K]."""
    return torch.unique(codes + 0.0, dim=0, return_inverse=True)[1]


def _decide(query: Tensor, codes: Tensor, near: Tensor) -> tuple[Tensor, Tensor]:
    """Lexicographic minimum of (squared distance, index) over the candidates `near` [N, K]; (0, infinity) without."""
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
    return torch.where(ids < codes.shape[0], ids, 0), least


def code_sums(vectors: Tensor, ids: Tensor, num_codes: int) -> tuple[Tensor, Tensor]:
    """Number of times each code was used, and the sum of the vectors given to it.

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


def ssim(x: Tensor, y: Tensor, line: Tensor, c1: float, c2: float, offset: float = 0.0) -> tuple[Tensor, Tensor]:
    """Means over windows of SSIM and of its contrast-structure factor.

    x, y [P, H, W] of any float dtype, line [k] symmetric weights with sum 1, offset added to both planes; returns
    float64 [P] twice. Both factors are 1 - (difference of moments) / (sum of moments), from the moments of x - y and
    x + y: equal planes give 1 exactly.
    Source: Wang et al. 2004, eq. 13.
    """
    maps = torch.stack([x.double() - y.double(), x.double() + y.double() + 2 * offset])
    maps = _weighted(_weighted(torch.cat([maps, maps.square()]), line, 3), line, 2)
    gap, total = maps[0].square(), maps[1].square()
    varying = maps[2] - gap
    contrast_lost = varying / ((maps[3] - total + varying) / 2 + c2)
    light_lost = gap / ((total + gap) / 2 + c1)
    whole_lost = light_lost + contrast_lost - light_lost * contrast_lost
    return 1 - whole_lost.mean((1, 2)), 1 - contrast_lost.mean((1, 2))


def _weighted(maps: Tensor, line: Tensor, dim: int) -> Tensor:
    """Sums of neighbours along an axis with the weights of a line, only where it lies inside."""
    count, weights = maps.shape[dim] - len(line) + 1, line.tolist()
    total = maps.narrow(dim, 0, count) * weights[0]
    for start, weight in enumerate(weights[1:], 1):
        total.add_(maps.narrow(dim, start, count), alpha=weight)
    return total
