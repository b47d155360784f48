"""Image metrics that can be trusted: per image, both images mapped from [-1, 1] to [0, 1].

Values outside [-1, 1] are clamped, as they are when an image is written. Non-finite values are an error. Values do not
depend on the batch: every image is measured by itself.
"""

from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from tokenizers_mm._check import finite_extremes, require
from tokenizers_mm.functional import similarity

Window = Literal["gaussian", "uniform7", "uniform8"]
"""SSIM's window: Gaussian 11 x 11, sigma 1.5 (Wang et al. 2004), or a square of equal weights with the covariance of a
sample (scikit-image's default, 7 x 7)."""

SIDES: dict[str, int] = {"gaussian": 11, "uniform7": 7, "uniform8": 8}
"""Pixels along a side of each window."""

MS_SSIM_SIDE = 11 * 2**4
"""Pixels that both sides of an image need for MS-SSIM."""


class Pair:
    """Images and what became of them, checked once: [B, 3, H, W] in [-1, 1], of one shape, finite.

    Every image is measured by itself. What two measures need is computed once.
    """

    def __init__(self, a: Float[Tensor, "b 3 h w"], b: Float[Tensor, "b 3 h w"]) -> None:
        """Values outside [-1, 1] are clamped.

        Raises:
            ValueError: other shapes or kinds of numbers, NaN or infinity.
        """
        require(a.ndim == 4 and a.shape[1] == 3 and a.is_floating_point(), "a", "float [B, 3, H, W] in [-1, 1]", a)
        require(b.is_floating_point() and b.shape == a.shape, "b", f"float {list(a.shape)} in [-1, 1]", b)
        dtype = torch.promote_types(torch.promote_types(a.dtype, b.dtype), torch.float32)
        self.a, self.b = _clamped(a, "a").to(dtype), _clamped(b, "b").to(dtype)
        self._parts: dict[tuple[str, float], tuple[Tensor, Tensor]] = {}

    def psnr(self) -> Float[Tensor, "b"]:
        """Peak signal-to-noise ratio in dB, infinite for equal images."""
        pairs = zip(self.a, self.b, strict=True)
        errors = [(x - y).square_().sum(2).double().sum() / x.numel() for x, y in pairs]
        return similarity.decibel(torch.stack(errors), data_range=2.0)

    def ssim(self, window: Window = "gaussian", data_range: float = 1.0) -> Float[Tensor, "b"]:
        """Structural similarity: see the function of this name."""
        require(window in SIDES, "window", f"one of {sorted(SIDES)}", window)
        self._require_sides(SIDES[window])
        return self._ssim_parts(window, data_range)[0].mean(1)

    def ms_ssim(self) -> Float[Tensor, "b"]:
        """Multi-scale structural similarity on five scales; both sides must have at least 176 pixels."""
        self._require_sides(MS_SSIM_SIDE)
        return similarity.ms_ssim(self.a, self.b, 2.0, offset=1.0, first=self._ssim_parts("gaussian", 1.0))

    def _ssim_parts(self, window: str, data_range: float) -> tuple[Tensor, Tensor]:
        """`similarity.ssim_parts` of the images in [0, 2], for a data range of images in [0, 1]."""
        if (window, data_range) not in self._parts:
            uniform = window != "gaussian"
            line = similarity.uniform_line(SIDES[window]) if uniform else similarity.gaussian_line()
            found = similarity.ssim_parts(self.a, self.b, line, 2 * data_range, uniform, offset=1.0)
            self._parts[window, data_range] = found
        return self._parts[window, data_range]

    def _require_sides(self, side: int) -> None:
        require(min(self.a.shape[-2:]) >= side, "a", f"images of at least {side} x {side} pixels", self.a)


def psnr(a: Float[Tensor, "b 3 h w"], b: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b"]:
    """Peak signal-to-noise ratio in dB, infinite for equal images."""
    return Pair(a, b).psnr()


def ssim(
    a: Float[Tensor, "b 3 h w"], b: Float[Tensor, "b 3 h w"], window: Window = "gaussian", data_range: float = 1.0
) -> Float[Tensor, "b"]:
    """Structural similarity (Wang et al. 2004): K1 0.01, K2 0.03, channel mean.

    Only windows that lie inside the image count, so both sides must have at least 11 pixels (7 or 8 for the others).
    data_range: 1 is right for these images; some published values were computed with 2, which makes them higher.
    """
    return Pair(a, b).ssim(window, data_range)


def ms_ssim(a: Float[Tensor, "b 3 h w"], b: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b"]:
    """Multi-scale structural similarity on five scales; both sides must have at least 176 pixels."""
    return Pair(a, b).ms_ssim()


def _clamped(x: Tensor, name: str) -> Tensor:
    """Images clamped to [-1, 1]; the same tensor where nothing is outside."""
    low, high = finite_extremes(x, name)
    return x if low >= -1 and high <= 1 else x.clamp(-1, 1)
