"""Finite scalar quantization: every channel is rounded to one of a few levels (arXiv 2309.15505, section 3)."""

import math

import torch
from jaxtyping import Float, Int
from torch import Tensor

SLACK = 1e-3
"""By how much the bounded range exceeds the levels at both ends, relative, so that the outermost can be reached."""


def round_to_levels(z: Float[Tensor, "*n d"], levels: tuple[int, ...]) -> Float[Tensor, "*n d"]:
    """Whole numbers, `levels` of them per channel around zero, with the gradient of the bounding function (tanh)."""
    counts = torch.tensor(levels, dtype=z.dtype, device=z.device)
    half = (counts - 1) * (1 + SLACK) / 2
    offset = torch.where(counts % 2 == 0, 0.5, 0.0)
    bounded = (z + (offset / half).atanh()).tanh() * half - offset
    return bounded + (bounded.round() - bounded).detach()


def levels_to_ids(whole: Float[Tensor, "*n d"], levels: tuple[int, ...]) -> Int[Tensor, "*n"]:
    """One id per vector of whole numbers around zero; the first channel counts fastest."""
    counts = torch.tensor(levels, device=whole.device)
    basis = torch.tensor([math.prod(levels[:i]) for i in range(len(levels))], device=whole.device)
    return ((whole.detach().round().long() + counts // 2) * basis).sum(-1)


def ids_to_levels(ids: Int[Tensor, "*n"], levels: tuple[int, ...]) -> Float[Tensor, "*n d"]:
    """The inverse of `levels_to_ids`, float32."""
    basis = [math.prod(levels[:i]) for i in range(len(levels))]
    parts = [ids // step % count - count // 2 for step, count in zip(basis, levels, strict=True)]
    return torch.stack(parts, -1).float()
