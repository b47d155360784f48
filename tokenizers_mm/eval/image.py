"""Image metrics that can be trusted: per image, both images mapped from [-1, 1] to [0, 1].

Values outside [-1, 1] are clamped, as they are when an image is written. Non-finite values are an error.
"""

import math
from collections.abc import Sequence
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from tokenizers_mm._check import require
from tokenizers_mm.functional import similarity

Window = Literal["gaussian", "uniform7", "uniform8"]
"""SSIM's window: Gaussian 11 x 11, sigma 1.5 (Wang et al. 2004), or a square of equal weights with the covariance of a
sample (scikit-image's default, 7 x 7)."""

SIDES: dict[str, int] = {"gaussian": 11, "uniform7": 7, "uniform8": 8}
"""Pixels along a side of each window."""

MS_SSIM_SIDE = 11 * 2**4
"""Pixels that both sides of an image need for MS-SSIM."""

Unit = Sequence[Tensor]
"""The three channels of images, each float64 [B, 1, H, W] in [0, 1]: parts that stay in a processor's cache."""


def psnr(a: Float[Tensor, "b 3 h w"], b: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b"]:
    """Peak signal-to-noise ratio in dB, infinite for equal images."""
    return psnr_of(*_pair(a, b))


def ssim(
    a: Float[Tensor, "b 3 h w"], b: Float[Tensor, "b 3 h w"], window: Window = "gaussian", data_range: float = 1.0
) -> Float[Tensor, "b"]:
    """Structural similarity (Wang et al. 2004): K1 0.01, K2 0.03, channel mean.

    Only windows that lie inside the image count, so both sides must have at least 11 pixels (7 or 8 for the others).
    data_range: 1 is right for these images; some published values were computed with 2, which makes them higher.
    """
    return ssim_of(*_pair(a, b), window, data_range)


def ms_ssim(a: Float[Tensor, "b 3 h w"], b: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b"]:
    """Multi-scale structural similarity on five scales; both sides must have at least 176 pixels."""
    return ms_ssim_of(*_pair(a, b))


def psnr_of(a: Unit, b: Unit) -> Float[Tensor, "b"]:
    """`psnr` of images that `to_unit` has mapped."""
    errors = [(x - y).square_().flatten(1).mean(1) for x, y in zip(a, b, strict=True)]
    return similarity.decibel(torch.stack(errors).mean(0))


def ssim_of(a: Unit, b: Unit, window: Window = "gaussian", data_range: float = 1.0) -> Float[Tensor, "b"]:
    """`ssim` of images that `to_unit` has mapped."""
    require(window in SIDES, "window", f"one of {sorted(SIDES)}", window)
    side = SIDES[window]
    require(min(a[0].shape[-2:]) >= side, "a", f"images of at least {side} x {side} pixels", a[0])
    uniform = window != "gaussian"
    line = similarity.uniform_line(side) if uniform else similarity.gaussian_line()
    pairs = zip(a, b, strict=True)
    return torch.cat([similarity.ssim_parts(x, y, line, data_range, uniform)[0] for x, y in pairs], 1).mean(1)


def ms_ssim_of(a: Unit, b: Unit) -> Float[Tensor, "b"]:
    """`ms_ssim` of images that `to_unit` has mapped."""
    least = MS_SSIM_SIDE
    require(min(a[0].shape[-2:]) >= least, "a", f"images of at least {least} x {least} pixels", a[0])
    return torch.stack([similarity.ms_ssim(x, y) for x, y in zip(a, b, strict=True)]).mean(0)


def to_unit(x: Float[Tensor, "b 3 h w"], name: str = "images") -> Unit:
    """Images in [-1, 1] mapped to [0, 1], clamped; refused where they are not finite."""
    require(x.ndim == 4 and x.shape[1] == 3 and x.is_floating_point(), name, "float [B, 3, H, W] in [-1, 1]", x)
    require_finite_image(x, name)
    parts = (x[:, channel : channel + 1].to(torch.float64, copy=True) for channel in range(3))
    return [part.clamp_(-1, 1).add_(1).div_(2) for part in parts]


def require_finite_image(x: Tensor, name: str) -> None:
    """Refuse NaN and infinity, which the least or the greatest value tells; faster than to look at each."""
    require(
        x.numel() == 0 or all(map(math.isfinite, map(float, x.aminmax()))), name, "finite values", "NaN or infinity"
    )


def _pair(a: Tensor, b: Tensor) -> tuple[Unit, Unit]:
    """Both images, of one shape."""
    first = to_unit(a, "a")
    require(b.is_floating_point() and b.shape == a.shape, "b", f"float {list(a.shape)} in [-1, 1]", b)
    return first, to_unit(b, "b")
