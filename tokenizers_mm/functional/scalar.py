"""Scalar quantization: every channel by itself, to one of a few levels.

Sources: Mentzer et al., Finite Scalar Quantization (FSQ, arXiv 2309.15505), section 3; iFSQ (arXiv 2601.17124), whose
bound makes the levels of normal features about equally frequent; Wang et al., Cubic Discrete Diffusion (CubiD,
arXiv 2603.19232), section 3.2 (levels for the channels of frozen features).
"""

import math
from itertools import pairwise
from statistics import NormalDist
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

Bound = Literal["tanh", "symmetric", "sigmoid"]
"""Bound of features before rounding: FSQ's tanh, its variant with levels symmetric about 0, iFSQ's sigmoid."""

SLACK = 1e-3
"""Excess of the bounded range over the levels at both ends, relative, so that the outermost can be reached."""

SIGMOID_SLOPE = 1.6
"""Slope of iFSQ's bound 2 sigmoid(1.6 z) - 1."""


def round_to_levels(z: Float[Tensor, "*n d"], levels: tuple[int, ...], bound: Bound = "tanh") -> Float[Tensor, "*n d"]:
    """Whole numbers from -(L // 2) to (L - 1) // 2, L = levels[d], with the gradient of the bounding function."""
    bounded, _ = _bounded(z, levels, bound)
    whole = (bounded + 0.5).floor() if bound == "symmetric" else bounded.round()
    return bounded + (whole - bounded).detach()


def rounding_margin(z: Float[Tensor, "*n d"], levels: tuple[int, ...], bound: Bound = "tanh") -> Float[Tensor, "*n"]:
    """Margins: `round_to_levels` gives the same for any change of z with a norm below margin / 2.

    A change of one channel moves its bounded value by at most the largest slope of the bounding function times as much,
    and the nearest border between two levels is the first that could be crossed.
    """
    bounded, slope = _bounded(z, levels, bound)
    return ((0.5 - (bounded - bounded.round()).abs()) / slope).amin(-1) * 2


def _bounded(z: Tensor, levels: tuple[int, ...], bound: Bound) -> tuple[Tensor, Tensor]:
    """z inside of the range of the levels, and the largest slope of that map by channel."""
    counts = torch.tensor(levels, dtype=z.dtype, device=z.device)
    offset = (counts % 2 == 0).to(z.dtype) / 2
    if bound == "tanh":
        half = (counts - 1) * (1 + SLACK) / 2
        return (z + (offset / half).atanh()).tanh() * half - offset, half
    half = (counts - 1) / 2
    if bound == "symmetric":
        return z.tanh() * half - offset, half
    return (2 * torch.sigmoid(SIGMOID_SLOPE * z) - 1) * half - offset, half * SIGMOID_SLOPE / 2


def level_values(whole: Float[Tensor, "*n d"], levels: tuple[int, ...], bound: Bound = "tanh") -> Float[Tensor, "*n d"]:
    """Whole numbers of `round_to_levels` scaled to [-1, 1]: by L // 2; symmetric: from -1 to 1 in L - 1 steps."""
    counts = torch.tensor(levels, dtype=whole.dtype, device=whole.device)
    if bound == "symmetric":
        return (whole + counts.div(2, rounding_mode="floor")) * (2 / (counts - 1)) - 1
    return whole / counts.div(2, rounding_mode="floor")


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


def uniform_levels(count: int, low: float, high: float) -> Float[Tensor, "l"]:
    """Centres of `count` equal bins of [low, high], float64."""
    return low + (torch.arange(count, dtype=torch.float64) + 0.5) * ((high - low) / count)


def normal_levels(count: int, low: float, high: float, deviations: float = 3.0) -> Float[Tensor, "l"]:
    """Means of a normal distribution on `count` bins of equal probability, float64.

    [low, high] are `deviations` standard deviations on both sides of the mean, where the outermost bins end.
    """
    normal = NormalDist()
    inner = [normal.inv_cdf(i / count) for i in range(1, count)]
    edges = [max(-deviations, min(deviations, edge)) for edge in (-deviations, *inner, deviations)]
    pairs = list(pairwise(edges))
    means = [(normal.pdf(a) - normal.pdf(b)) / (normal.cdf(b) - normal.cdf(a)) for a, b in pairs]
    return low + (torch.tensor(means, dtype=torch.float64) + deviations) * ((high - low) / (2 * deviations))


def level_margin(x: Float[Tensor, "*n"], values: Float[Tensor, "l"]) -> Float[Tensor, "*n"]:
    """Margins: `nearest_level` gives the same for any change of x below margin / 2; infinity for one value."""
    borders = (values[1:] + values[:-1]) / 2
    if len(borders) == 0:
        return torch.full_like(x, torch.inf)
    above = torch.bucketize(x.detach().contiguous(), borders)
    near = torch.stack([borders[(above - 1).clamp_min(0)], borders[above.clamp_max(len(borders) - 1)]])
    return 2 * (near - x).abs().amin(0)


def nearest_level(x: Float[Tensor, "*n"], values: Float[Tensor, "l"]) -> Int[Tensor, "*n"]:
    """Index of the nearest of ascending `values`, the lower one half-way between two; int64 [...]."""
    return torch.bucketize(x.detach().contiguous(), (values[1:] + values[:-1]) / 2)
