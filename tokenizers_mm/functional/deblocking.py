"""Smoothing of what a decoder that draws an image patch by patch leaves behind: steps at the edges of the patches, and
in plain areas a pattern that repeats from patch to patch.

Both are of about the size of its quantization error. What is larger than that belongs to the image and stays.
"""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from tokenizers_mm.functional.precision import at_least_float32

RAMP = (1.0, 2 / 3, 1 / 3)
"""Share of the correction that pixels get on either side of an edge, by their distance from it."""


def deblock(x: Float[Tensor, "b c h w"], patch: int, threshold: float) -> Float[Tensor, "b c h w"]:
    """Images with smoother edges between patches of `patch` (at least 6) x `patch` pixels (after List et al., Adaptive
    Deblocking Filter, IEEE TCSVT 2003).

    The step at an edge, beyond the slope on both sides of it, is cut by exp(-m / threshold^2), with m the mean square
    of the step over the channels; both sides share the correction along a ramp.
    """
    for _ in range(2):  # vertical edges, then horizontal ones
        x = _smooth_columns(x, patch, threshold).transpose(-1, -2)
    return x


def smooth_plain(x: Float[Tensor, "b c h w"], patch: int, threshold: float) -> Float[Tensor, "b c h w"]:
    """Images whose deviations of less than about `threshold` from the mean of their surroundings are averaged out.

    A self-guided filter (He et al., Guided Image Filtering, IEEE TPAMI 2013, sections 3.1 and 3.2) with epsilon =
    threshold^2 and one variance for all channels. A pattern that repeats every `patch` pixels has no part in its means.
    """
    wide = at_least_float32(x)
    rows, columns = (_averages(size, patch, wide) for size in x.shape[-2:])

    def mean(values: Tensor) -> Tensor:
        return rows @ values @ columns.T

    with torch.autocast(x.device.type, enabled=False):  # half precision cannot hold the variance
        middle = mean(wide)
        variance = (mean(wide.square()) - middle.square()).mean(1, keepdim=True).clamp_min(0)
        kept = variance / (variance + threshold**2)
        return (mean(kept) * wide + mean(middle - kept * middle)).to(x.dtype)


def _averages(size: int, patch: int, like: Tensor) -> Tensor:
    """[size, size]: row i averages the `patch` values around value i, for an even patch both such windows.

    Windows end at the border.
    """
    windows = F.avg_pool1d(
        torch.eye(size, dtype=like.dtype, device=like.device), patch, 1, patch // 2, count_include_pad=False
    )
    return (windows if patch % 2 else (windows[:, 1:] + windows[:, :-1]) / 2).T


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
