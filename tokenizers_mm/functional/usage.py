"""How well a codebook is used, from exact counts."""

import torch
from jaxtyping import Int
from torch import Tensor


def count_ids(ids: Int[Tensor, "*n"], num_codes: int) -> Int[Tensor, "k"]:
    """How often each code occurs, int64 [K]; counts of several batches or ranks may be added."""
    return torch.bincount(ids.reshape(-1), minlength=num_codes)


def usage(counts: Int[Tensor, "k"]) -> float:
    """Share of the codes that occur at all, in [0, 1]."""
    return float((counts > 0).double().mean())


def perplexity(counts: Int[Tensor, "k"]) -> float:
    """exp of the entropy of the code frequencies, from 1 (one code) to K (all alike); 0 where nothing was counted."""
    p = counts.double() / counts.sum().clamp_min(1)
    return float(torch.special.entr(p).sum().exp()) if int(counts.sum()) else 0.0
