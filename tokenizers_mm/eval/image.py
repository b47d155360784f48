"""Image metrics that can be trusted: per image, both images mapped from [-1, 1] to [0, 1].

Values outside [-1, 1] are clamped, as they are when an image is written. Non-finite values are an error.
"""

from typing import Literal

from jaxtyping import Float
from torch import Tensor

from tokenizers_mm._check import require
from tokenizers_mm.functional import similarity

Window = Literal["gaussian", "uniform7", "uniform8"]
"""SSIM's window: Gaussian 11 x 11, sigma 1.5 (Wang et al. 2004), or a square of equal weights with the covariance of a
sample (scikit-image's default, 7 x 7)."""

MS_SSIM_SIDE = 11 * 2**4
"""Pixels that both sides of an image need for MS-SSIM."""


def psnr(a: Float[Tensor, "b 3 h w"], b: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b"]:
    """Peak signal-to-noise ratio in dB, infinite for equal images."""
    return similarity.psnr(*_pair(a, b))


def ssim(
    a: Float[Tensor, "b 3 h w"], b: Float[Tensor, "b 3 h w"], window: Window = "gaussian", data_range: float = 1.0
) -> Float[Tensor, "b"]:
    """Structural similarity (Wang et al. 2004): K1 0.01, K2 0.03, channel mean.

    Only windows that lie inside the image count, so both sides must have at least 11 pixels (7 or 8 for the others).
    data_range: 1 is right for these images; some published values were computed with 2, which makes them higher.
    """
    a, b = _pair(a, b)
    least = {"gaussian": 11, "uniform7": 7, "uniform8": 8}
    require(window in least, "window", f"one of {sorted(least)}", window)
    require(min(a.shape[-2:]) >= least[window], "a", f"images of at least {least[window]} x {least[window]} pixels", a)
    uniform = window != "gaussian"
    line = similarity.uniform_line(least[window]) if uniform else similarity.gaussian_line()
    return similarity.ssim_parts(a, b, line, data_range, sample_covariance=uniform)[0].mean(1)


def ms_ssim(a: Float[Tensor, "b 3 h w"], b: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b"]:
    """Multi-scale structural similarity on five scales; both sides must have at least 176 pixels."""
    a, b = _pair(a, b)
    require(min(a.shape[-2:]) >= MS_SSIM_SIDE, "a", f"images of at least {MS_SSIM_SIDE} x {MS_SSIM_SIDE} pixels", a)
    return similarity.ms_ssim(a, b)


def _pair(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Both images in [0, 1], float64."""
    require(a.ndim == 4 and a.shape[1] == 3 and a.is_floating_point(), "a", "float [B, 3, H, W] in [-1, 1]", a)
    require(b.is_floating_point() and b.shape == a.shape, "b", f"float {list(a.shape)} in [-1, 1]", b)
    for name, x in (("a", a), ("b", b)):
        require(bool(x.isfinite().all()), name, "finite values", "NaN or infinity")
    return tuple(x.double().clamp(-1, 1).add_(1).div_(2) for x in (a, b))  # type: ignore[return-value]
