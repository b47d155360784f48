"""Finite scalar quantization: every channel is rounded to one of a few levels (arXiv 2309.15505, section 3)."""

import math

import torch
from jaxtyping import Float, Int
from torch import Tensor

SLACK = 1e-3
"""By how much the bounded range exceeds the levels at both ends, relative, so that the outermost can be reached."""


def round_to_levels(z: Float[Tensor, "*n d"], levels: tuple[int, ...]) -> Float[Tensor, "*n d"]:
    """Whole numbers, `levels` of them per channel around zero, with the gradient of the bounding function (tanh)."""
    bounded, _ = _bounded(z, levels)
    return bounded + (bounded.round() - bounded).detach()


def rounding_margin(z: Float[Tensor, "*n d"], levels: tuple[int, ...]) -> Float[Tensor, "*n"]:
    """Margins: `round_to_levels` gives the same for any change of z with a norm below margin / 2.

    A change of one channel moves its bounded value by at most half the range of the levels times as much (tanh), and
    the nearest border between two levels is the first that could be crossed.
    """
    bounded, half = _bounded(z, levels)
    return ((0.5 - (bounded - bounded.round()).abs()) / half).amin(-1) * 2


def _bounded(z: Tensor, levels: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """z inside of the range of the levels, and half of that range by channel."""
    counts = torch.tensor(levels, dtype=z.dtype, device=z.device)
    half = (counts - 1) * (1 + SLACK) / 2
    offset = (counts % 2 == 0).to(z.dtype) / 2
    return (z + (offset / half).atanh()).tanh() * half - offset, half


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
