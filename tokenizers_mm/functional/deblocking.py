"""Smoothing of small steps at the edges of patches (after List et al., Adaptive Deblocking Filter, IEEE TCSVT 2003).

A decoder that draws an image patch by patch leaves steps at the edges, of about the size of its quantization error. A
step that is larger than that is an edge of the image and stays.
"""

import torch
from jaxtyping import Float
from torch import Tensor

RAMP = (1.0, 2 / 3, 1 / 3)
"""Share of the correction that pixels get on either side of an edge, by their distance from it."""


def deblock(x: Float[Tensor, "b c h w"], patch: int, threshold: float) -> Float[Tensor, "b c h w"]:
    """Images with smoother edges between patches of `patch` (at least 6) x `patch` pixels.

    The step at an edge, beyond the slope on both sides of it, is cut by exp(-m / threshold^2), with m the mean square
    of the step over the channels; both sides share the correction along a ramp.
    """
    for _ in range(2):  # vertical edges, then horizontal ones
        x = _smooth_columns(x, patch, threshold).transpose(-1, -2)
    return x


def _smooth_columns(x: Tensor, patch: int, threshold: float) -> Tensor:
    parts = x.unflatten(-1, (-1, patch))
    left, right = parts[..., :-1, :], parts[..., 1:, :]
    slope = (left[..., -1] - left[..., -2] + right[..., 1] - right[..., 0]) / 2
    step = right[..., 0] - left[..., -1] - slope
    kept = torch.exp(-step.square().mean(1, keepdim=True) / threshold**2)
    ramp = x.new_tensor(RAMP)
    change = (step * kept / 2).unsqueeze(-1) * ramp
    correction = torch.zeros_like(parts)
    correction[..., :-1, patch - len(RAMP) :] += change.flip(-1)
    correction[..., 1:, : len(RAMP)] -= change
    return (parts + correction).flatten(-2)
