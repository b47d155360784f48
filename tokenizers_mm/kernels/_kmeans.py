"""k-means on the exact nearest code and the ordered sums: the same bits for any number of threads."""

from dataclasses import dataclass

import torch
from torch import Tensor

from tokenizers_mm._check import fail, require, require_finite
from tokenizers_mm.kernels import _ops

SEEDING_ROUNDS = 128
"""Rounds of k-means++ in which centres are drawn; up to this many centres, one each."""


@dataclass(frozen=True)
class KMeans:
    """The result of `kmeans`: codebook [K, D], the id of every row int64 [N], the sum of squared distances of the rows
    to their codes, and how many iterations were made.
    """

    codebook: Tensor
    ids: Tensor
    inertia: float
    iterations: int


def kmeans(
    z: Tensor,
    num_codes: int,
    *,
    init: str | Tensor = "k-means++",
    iterations: int = 25,
    batch_size: int | None = None,
    tolerance: float = 1e-4,
    seed: int = 0,
) -> KMeans:
    """Centres of the rows of z [N, D], float, by Lloyd's algorithm.

    num_codes: K, at most N.
    init: "k-means++" (Arthur and Vassilvitskii, SODA 2007; for more than 255 centres several are drawn per round, as in
    k-means||, Bahmani et al., VLDB 2012), "random" (rows drawn without replacement), or the centres [K, D].
    iterations: at most so many; they end when no row changes its centre or when the inertia falls by less than
    `tolerance`, relative.
    batch_size: rows per iteration; None uses all. Smaller batches move each centre by the mean of its rows so far
    (mini-batch k-means, Sculley, WWW 2010), without an early end.
    seed: of all random draws; equal arguments give equal bits.

    A centre without rows moves to a row drawn in proportion to its squared distance, as in k-means++. Returns a
    `KMeans`, its codebook in the dtype of z (float32 where that is narrower), ids and inertia those of this codebook.

    Raises: ValueError for other shapes and for features that are not finite.
    """
    wide = torch.float64 if z.dtype == torch.float64 else torch.float32
    require(z.ndim == 2 and z.is_floating_point() and z.shape[1] > 0, "z", "float [N, D]", z)
    require(1 <= num_codes <= z.shape[0], "num_codes", f"1 to {z.shape[0]}, the rows of z", num_codes)
    require(iterations >= 0, "iterations", ">= 0", iterations)
    require(batch_size is None or batch_size > 0, "batch_size", ">= 1 or None", batch_size)
    require_finite("z", "features", z)
    with torch.no_grad():
        rows = z.detach().to(wide).contiguous()
        generator = torch.Generator().manual_seed(seed)
        codebook = _start(rows, num_codes, init, generator)
        if batch_size is not None and batch_size < len(rows):
            done = iterations
            codebook = _mini_batches(rows, codebook, iterations, batch_size, generator)
        else:
            codebook, done = _lloyd(rows, codebook, iterations, tolerance, generator)
        distance, ids = _ops.nearest_distance(rows, codebook)
        return KMeans(codebook, ids, _total(distance), done)


def _start(z: Tensor, num_codes: int, init: str | Tensor, generator: torch.Generator) -> Tensor:
    if isinstance(init, Tensor):
        require(init.shape == (num_codes, z.shape[1]), "init", f"float [{num_codes}, {z.shape[1]}]", init)
        return init.detach().to(z).clone(memory_format=torch.contiguous_format)
    if init == "random":
        return z[torch.randperm(len(z), generator=generator)[:num_codes].to(z.device)]
    if init != "k-means++":
        fail("init", '"k-means++", "random" or a tensor [K, D]', init)
    chosen = [int(torch.randint(len(z), (), generator=generator))]
    nearest = torch.full((len(z),), torch.inf, dtype=torch.float64)
    fresh = chosen
    while len(chosen) < num_codes:
        distance, _ = _ops.nearest_distance(z, z[fresh])
        nearest = torch.minimum(nearest, distance.double().cpu())
        nearest[chosen] = 0.0  # never twice, also where rounding leaves a distance
        wanted = min(max(1, num_codes // SEEDING_ROUNDS), num_codes - len(chosen))
        fresh = _draw(nearest, wanted, generator) or [0] * (num_codes - len(chosen))  # every row equals a centre
        chosen += fresh
    return z[chosen]


def _total(distance: Tensor) -> float:
    """Their sum, added in order: the same bits for any number of threads."""
    return float(distance.double().cpu().cumsum(0)[-1])


def _draw(weights: Tensor, count: int, generator: torch.Generator) -> list[int]:
    """At most `count` different rows, each drawn with a probability in proportion to its weight (float64, on the CPU);
    none where all weights are zero."""
    total = weights.cumsum(0)
    places = torch.rand(count, generator=generator, dtype=torch.float64) * total[-1]
    drawn = torch.searchsorted(total, places, right=True).clamp_max(len(weights) - 1)
    return drawn[weights[drawn] > 0].unique().tolist()


def _lloyd(
    z: Tensor, codebook: Tensor, iterations: int, tolerance: float, generator: torch.Generator
) -> tuple[Tensor, int]:
    former, former_ids = torch.inf, None
    for done in range(iterations):
        distance, ids = _ops.nearest_distance(z, codebook)
        inertia = _total(distance)
        if former_ids is not None and (torch.equal(ids, former_ids) or former - inertia <= tolerance * former):
            return codebook, done
        former, former_ids = inertia, ids
        sums, counts = _ops.code_sums(z, ids, len(codebook))
        codebook = _means(codebook, sums, counts)
        _place_idle(codebook, counts, z, distance, generator)
    return codebook, iterations


def _means(codebook: Tensor, sums: Tensor, counts: Tensor) -> Tensor:
    """The mean of every code's rows; a code without rows stays where it is."""
    means = sums / counts.clamp_min(1)[:, None]
    return torch.where(counts[:, None] > 0, means, codebook.double()).to(codebook.dtype)


def _place_idle(codebook: Tensor, counts: Tensor, z: Tensor, distance: Tensor, generator: torch.Generator) -> None:
    """Move the codes without rows to rows far from their codes."""
    idle = (counts == 0).nonzero()[:, 0]
    if len(idle):
        drawn = _draw(distance.double().cpu(), len(idle), generator)
        codebook[idle[: len(drawn)]] = z[drawn]


def _mini_batches(z: Tensor, codebook: Tensor, iterations: int, batch_size: int, generator: torch.Generator) -> Tensor:
    """Every code is the mean of all rows it was given so far; codes without any are placed by the first batches."""
    totals = torch.zeros(codebook.shape, dtype=torch.float64, device=z.device)
    seen = torch.zeros(len(codebook), dtype=torch.int64, device=z.device)
    for _ in range(iterations):
        batch = z[torch.randint(len(z), (batch_size,), generator=generator).to(z.device)]
        distance, ids = _ops.nearest_distance(batch, codebook)
        sums, counts = _ops.code_sums(batch, ids, len(codebook))
        totals, seen = totals + sums, seen + counts
        codebook = _means(codebook, totals, seen)
        _place_idle(codebook, seen, batch, distance, generator)
    return codebook
