"""Image metrics that can be trusted: per image, both images mapped from [-1, 1] to [0, 1], data range 1.

Values outside [-1, 1] are clamped, as they are when an image is written. Non-finite values are an error.
"""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from tokenizers_mm._check import require


def psnr(a: Float[Tensor, "b 3 h w"], b: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b"]:
    """Peak signal-to-noise ratio in dB, infinite for equal images."""
    a, b = _pair(a, b)
    return -10 * (a - b).square().flatten(1).mean(1).log10()


def ssim(a: Float[Tensor, "b 3 h w"], b: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b"]:
    """Structural similarity (Wang et al. 2004): Gaussian window 11 x 11, sigma 1.5, K1 0.01, K2 0.03, channel mean.

    Only windows that lie inside the image count, so both sides must have at least 11 pixels.
    """
    a, b = _pair(a, b)
    require(min(a.shape[-2:]) >= 11, "a", "images of at least 11 x 11 pixels", a)
    steps = torch.arange(-5, 6, dtype=torch.float64, device=a.device)
    line = torch.exp(-steps.square() / (2 * 1.5**2))
    line = line / line.sum()

    def blur(x: Tensor) -> Tensor:
        kernel = line.view(1, 1, 1, -1).expand(3, 1, 1, -1)
        return F.conv2d(F.conv2d(x, kernel, groups=3), kernel.transpose(2, 3), groups=3)

    mean_a, mean_b = blur(a), blur(b)
    var_a, var_b, cov = blur(a * a) - mean_a**2, blur(b * b) - mean_b**2, blur(a * b) - mean_a * mean_b
    c1, c2 = 0.01**2, 0.03**2
    score = (2 * mean_a * mean_b + c1) * (2 * cov + c2) / ((mean_a**2 + mean_b**2 + c1) * (var_a + var_b + c2))
    return score.flatten(1).mean(1)


def _pair(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Both images in [0, 1], float64."""
    require(a.ndim == 4 and a.shape[1] == 3 and a.is_floating_point(), "a", "float [B, 3, H, W] in [-1, 1]", a)
    require(b.is_floating_point() and b.shape == a.shape, "b", f"float {list(a.shape)} in [-1, 1]", b)
    for name, x in (("a", a), ("b", b)):
        require(bool(torch.isfinite(x).all()), name, "finite values", "NaN or infinity")
    return tuple((x.double().clamp(-1, 1) + 1) / 2 for x in (a, b))  # type: ignore[return-value]
