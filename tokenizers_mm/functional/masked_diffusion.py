"""Masked discrete diffusion over tokens: what is hidden, the loss, and how many are revealed.

Source: Chang et al., MaskGIT (arXiv 2202.04200), section 3.2 (cosine schedule) and 3.3 (decoding); Nie et al., LLaDA
(arXiv 2502.09992), eq. 3, and Yang et al., MMaDA (arXiv 2505.15809), eq. 1 (the loss).
"""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from tokenizers_mm.functional.precision import at_least_float32

Generators = torch.Generator | Sequence[torch.Generator] | None
"""One generator for a batch, or one for each of its rows, whose draws then do not depend on the rest of the batch."""


def uniform(rows: int, columns: int, generator: Generators = None) -> Float[Tensor, "b n"]:
    """Uniform numbers in [0, 1), on the CPU."""
    if generator is None or isinstance(generator, torch.Generator):
        return torch.rand(rows, columns, generator=generator)
    return torch.stack([torch.rand(columns, generator=row) for row in generator])


def hide(maskable: Bool[Tensor, "b l"], ratio: Float[Tensor, "b"], generator: Generators = None) -> Bool[Tensor, "b l"]:
    """Hide a random share `ratio` of the maskable tokens of each row, rounded, but at least one where there is one."""
    count = maskable.sum(1)
    wanted = torch.minimum((ratio * count).round().long().clamp_min(1), count)
    rows, columns = maskable.shape
    noise = uniform(rows, columns, generator).to(maskable.device)
    rank = noise.masked_fill(~maskable, torch.inf).argsort(1).argsort(1)
    return (rank < wanted[:, None]) & maskable


def cosine_ratio(t: Float[Tensor, "*n"]) -> Float[Tensor, "*n"]:
    """The share that is hidden at a time from 0 (all) to 1 (none)."""
    return torch.cos(t * (math.pi / 2))


def masked_diffusion_loss(
    logits: Float[Tensor, "n v"],
    tokens: Int[Tensor, "b l"],
    hidden: Bool[Tensor, "b l"],
    maskable: Bool[Tensor, "b l"],
) -> Float[Tensor, ""]:
    """Cross-entropy of the hidden tokens at their own places, each over the hidden share of its row.

    logits: of the hidden tokens alone, row by row.

    Mean over rows of (1 / r) * sum of -log p over hidden tokens / number of maskable tokens, r = hidden / maskable: so
    each row weighs the same however much of it is hidden. Rows with nothing maskable count as 0.
    """
    logits = at_least_float32(logits)
    terms = logits.new_zeros(tokens.shape)
    terms[hidden] = F.cross_entropy(logits, tokens[hidden], reduction="none")
    ratio = hidden.sum(1) / maskable.sum(1).clamp_min(1)
    return (terms.sum(1) / (ratio * maskable.sum(1)).clamp_min(1)).mean()


def left_hidden(count: int, step: int, steps: int) -> int:
    """Number of tokens, of `count`, that are still hidden after a step (counted from 0); none after the last."""
    return 0 if step + 1 >= steps else min(count - 1, math.floor(count * math.cos(math.pi / 2 * (step + 1) / steps)))
