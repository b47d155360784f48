"""Measures of the use of a codebook, from exact counts."""

import math

import torch
from jaxtyping import Int
from torch import Tensor


def count_ids(ids: Int[Tensor, "*n"], num_codes: int) -> Int[Tensor, "k"]:
    """Number of times each code occurs, int64 [K]; counts of several batches or ranks may be added."""
    return torch.bincount(ids.reshape(-1), minlength=num_codes)


def usage(counts: Int[Tensor, "k"]) -> float:
    """Share of the codes that occur at all, in [0, 1]."""
    return float((counts > 0).double().mean())


def perplexity(counts: Int[Tensor, "k"]) -> float:
    """exp of the entropy of the code frequencies, from 1 (one code) to K (all alike); 0 where nothing was counted."""
    p = counts.double() / counts.sum().clamp_min(1)
    return float(torch.special.entr(p).sum().exp()) if int(counts.sum()) else 0.0


def entropy(counts: Int[Tensor, "k"]) -> float:
    """Entropy of the frequencies in bits, with Miller and Madow's correction of its bias: (seen - 1) / 2N nats."""
    total = int(counts.sum())
    if total == 0:
        return 0.0
    plain = torch.special.entr(counts.double() / total).sum()
    return float((plain + (int((counts > 0).sum()) - 1) / (2 * total)) / math.log(2))


def adaptive_code_length(counts: Int[Tensor, "k"], prior: float = 0.5) -> float:
    """Bits that an ideal adaptive coder spends on ids with these counts, in whatever order they come.

    It starts knowing nothing and gives code k the probability (n_k + prior) / (n + K * prior); the default prior is
    Krichevsky and Trofimov's (1981). The product of these is a ratio of gamma functions.
    """
    counts, size = counts.double(), len(counts)
    start = torch.tensor(prior, dtype=torch.float64)
    seen = (torch.lgamma(counts + start) - torch.lgamma(start)).sum()
    whole = torch.lgamma(counts.sum() + size * start) - torch.lgamma(size * start)
    return float((whole - seen) / math.log(2))
