"""Choice of the masked tokens: random orders, the cosine schedule of their number, and ratios for training.

Sources: Chang et al., MaskGIT (arXiv 2202.04200), section 3.3; Li et al., Autoregressive Image Generation without
Vector Quantization (MAR, arXiv 2406.11838), section 4. Masks are boolean [B, L], True for a token that is not known;
every sample of a batch has the same number of them.
"""

import math
from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from tokenizers_mm._check import require


def random_orders(batch: int, length: int, generator: torch.Generator | None = None) -> Int[Tensor, "b l"]:
    """A random permutation of 0 .. length - 1 per sample, on the CPU."""
    return torch.rand(batch, length, generator=generator).argsort(dim=1)


def masked_counts(length: int, num_steps: int) -> list[int]:
    """Tokens still masked after each step, from fewer than `length` down to 0 (MaskGIT's cosine, at least one a step).

    The original's last step has 1 where this has 0: there it reveals all that is left.
    """
    require(1 <= num_steps <= length, "num_steps", f"1 to {length} (the number of tokens)", num_steps)
    counts, left = [], length
    for step in range(1, num_steps):
        left = max(1, min(left - 1, math.floor(length * math.cos(math.pi / 2 * step / num_steps))))
        counts.append(left)
    return [*counts, 0]


def truncated_normal_ratio(
    generator: torch.Generator | None = None,
    mean: float = 1.0,
    std: float = 0.25,
    low: float = 0.7,
    high: float = 1.0,
) -> float:
    """A draw from a normal distribution restricted to [low, high], by inversion of its distribution function."""
    lower, upper = (math.erf((x - mean) / (std * math.sqrt(2))) for x in (low, high))
    u = float(torch.rand((), dtype=torch.float64, generator=generator))
    position = torch.tensor(lower + u * (upper - lower), dtype=torch.float64)
    return min(high, max(low, mean + std * math.sqrt(2) * float(torch.special.erfinv(position))))


def mask_first(orders: Int[Tensor, "b m"], count: int, length: int | None = None) -> Bool[Tensor, "b l"]:
    """The mask of the first `count` positions of each order, over `length` tokens (as many as the order has)."""
    length = orders.shape[1] if length is None else length
    mask = torch.zeros(orders.shape[0], length, dtype=torch.bool, device=orders.device)
    return mask.scatter(1, orders[:, :count], torch.ones_like(orders[:, :count], dtype=torch.bool))


def random_mask(
    batch: int,
    length: int,
    generator: torch.Generator | None = None,
    rows: Sequence[torch.Generator] | None = None,
) -> Bool[Tensor, "b l"]:
    """A mask for training: one truncated normal ratio for the batch, rounded up to tokens; random places per sample.

    rows: a generator for the places of each sample, so that these do not depend on what else is in the batch.
    """
    count = math.ceil(length * truncated_normal_ratio(generator))
    if rows is None:
        return mask_first(random_orders(batch, length, generator), count)
    return mask_first(torch.cat([random_orders(1, length, row) for row in rows]), count)


def positions_where(chosen: Bool[Tensor, "b l"], name: str = "mask") -> Int[Tensor, "b n"]:
    """Positions of the True entries of each row, ascending; every row must have the same number."""
    counts = chosen.sum(1)
    count = int(counts[0])
    require(
        bool((counts == count).all()), name, "the same number of masked tokens in every sample", f"{counts.tolist()}"
    )
    return chosen.int().argsort(dim=1, descending=True, stable=True)[:, :count]


def take(x: Float[Tensor, "b l c"], positions: Int[Tensor, "b n"]) -> Float[Tensor, "b n c"]:
    """Rows of each sample at its positions."""
    return x.gather(1, positions[..., None].expand(-1, -1, x.shape[-1]))


def put(
    x: Float[Tensor, "b l c"], positions: Int[Tensor, "b n"], rows: Float[Tensor, "b n c"]
) -> Float[Tensor, "b l c"]:
    """A copy of x with the rows of each sample at its positions; the inverse of `take`."""
    return x.scatter(1, positions[..., None].expand(-1, -1, x.shape[-1]), rows.to(x.dtype))


def masked_mean(values: Float[Tensor, "n"], mask: Bool[Tensor, "n"]) -> Float[Tensor, ""]:
    """Mean of the values of masked tokens."""
    weight = mask.to(values.dtype)
    return (values * weight).sum() / weight.sum()
