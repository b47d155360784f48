"""Image metrics that can be trusted: per image, both images mapped from [-1, 1] to [0, 1].

Values outside [-1, 1] are clamped, as they are when an image is written. Non-finite values are an error. Values do not
depend on the batch: every image is measured by itself.
"""

from collections.abc import Iterator
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from tokenizers_mm._check import require
from tokenizers_mm._images import finite_extremes
from tokenizers_mm.functional import similarity

Window = Literal["gaussian", "uniform7", "uniform8"]
"""SSIM's window: Gaussian 11 x 11, sigma 1.5 (Wang et al. 2004), or a square of equal weights with the covariance of a
sample (scikit-image's default, 7 x 7)."""

SIDES: dict[str, int] = {"gaussian": 11, "uniform7": 7, "uniform8": 8}
"""Pixels along a side of each window."""

MS_SSIM_SIDE = 11 * 2**4
"""Pixels that both sides of an image need for MS-SSIM."""


def psnr(a: Float[Tensor, "b 3 h w"], b: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b"]:
    """Peak signal-to-noise ratio in dB, infinite for equal images."""
    a, b = _pair(a, b)
    errors = [(x - y).square_().sum(2).double().sum() / x.numel() for x, y in zip(a, b, strict=True)]
    return similarity.decibel(torch.stack(errors), data_range=2.0)


def ssim(
    a: Float[Tensor, "b 3 h w"], b: Float[Tensor, "b 3 h w"], window: Window = "gaussian", data_range: float = 1.0
) -> Float[Tensor, "b"]:
    """Structural similarity (Wang et al. 2004): K1 0.01, K2 0.03, channel mean.

    Only windows that lie inside the image count, so both sides must have at least 11 pixels (7 or 8 for the others).
    data_range: 1 is right for these images; some published values were computed with 2, which makes them higher.
    """
    require(window in SIDES, "window", f"one of {sorted(SIDES)}", window)
    side = SIDES[window]
    pairs = _unit_pairs(a, b, side)
    uniform = window != "gaussian"
    line = similarity.uniform_line(side) if uniform else similarity.gaussian_line()
    return torch.cat([similarity.ssim_parts(x, y, line, data_range, uniform)[0].mean(1) for x, y in pairs])


def ms_ssim(a: Float[Tensor, "b 3 h w"], b: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b"]:
    """Multi-scale structural similarity on five scales; both sides must have at least 176 pixels."""
    return torch.cat([similarity.ms_ssim(x, y) for x, y in _unit_pairs(a, b, MS_SSIM_SIDE)])


def _unit_pairs(a: Tensor, b: Tensor, side: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Pairs of images [1, 3, H, W] in [0, 1], one at a time: parts that stay in a processor's cache."""
    a, b = _pair(a, b)
    require(min(a.shape[-2:]) >= side, "a", f"images of at least {side} x {side} pixels", a)
    half = a.new_tensor(0.5)
    return ((half.add(x, alpha=0.5), half.add(y, alpha=0.5)) for x, y in zip(a.split(1), b.split(1), strict=True))


def _pair(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Both images, of one shape, in [-1, 1], in float32 or float64; refused where they are not finite."""
    require(a.ndim == 4 and a.shape[1] == 3 and a.is_floating_point(), "a", "float [B, 3, H, W] in [-1, 1]", a)
    require(b.is_floating_point() and b.shape == a.shape, "b", f"float {list(a.shape)} in [-1, 1]", b)
    dtype = torch.promote_types(torch.promote_types(a.dtype, b.dtype), torch.float32)
    return _clamped(a, "a").to(dtype), _clamped(b, "b").to(dtype)


def _clamped(x: Tensor, name: str) -> Tensor:
    """Images clamped to [-1, 1]; the same tensor where nothing is outside."""
    low, high = finite_extremes(x, name)
    return x if low >= -1 and high <= 1 else x.clamp(-1, 1)
