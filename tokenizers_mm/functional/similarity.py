"""Measures of how alike two images are, per image: PSNR, SSIM, MS-SSIM, the comparison of features of DISTS."""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from tokenizers_mm import kernels

SCALE_WEIGHTS = (0.0448, 0.2856, 0.3001, 0.2363, 0.1333)
"""Exponents of MS-SSIM's five scales (Wang, Simoncelli and Bovik 2003, section 3.2)."""


def gaussian_line(size: int = 11, sigma: float = 1.5) -> Float[Tensor, "k"]:
    """Weights of a Gaussian window along one axis, float64, sum 1."""
    steps = torch.arange(size, dtype=torch.float64) - (size - 1) / 2
    line = torch.exp(-steps.square() / (2 * sigma**2))
    return line / line.sum()


def uniform_line(size: int = 7) -> Float[Tensor, "k"]:
    """Weights of a uniform window along one axis, float64, sum 1."""
    return torch.full((size,), 1 / size, dtype=torch.float64)


def decibel(error: Float[Tensor, "*b"], data_range: float = 1.0) -> Float[Tensor, "*b"]:
    """Peak signal-to-noise ratio of mean squared errors, in dB; infinite for zero."""
    return 10 * (data_range**2 / error).log10()


def ssim_parts(
    a: Float[Tensor, "b c h w"],
    b: Float[Tensor, "b c h w"],
    line: Float[Tensor, "k"],
    data_range: float = 1.0,
    sample_covariance: bool = False,
    offset: float = 0.0,
) -> tuple[Float[Tensor, "b c"], Float[Tensor, "b c"]]:
    """Means over windows of SSIM and of its contrast-structure factor, by image and channel (Wang et al. 2004, eq. 13).

    line: of the window along one axis; only windows inside the image count. K1 is 0.01 and K2 0.03.
    sample_covariance: variances of a window of n pixels are multiplied by n / (n - 1), as scikit-image does by default.
    offset: is added to all pixels, so that the lowest value that one can have becomes 0.
    """
    count = len(line) ** 2
    scale = count / (count - 1) if sample_covariance else 1.0
    return kernels.ssim(a, b, line, (0.01 * data_range) ** 2, (0.03 * data_range) ** 2 / scale, offset)


def ms_ssim(
    a: Float[Tensor, "b c h w"],
    b: Float[Tensor, "b c h w"],
    data_range: float = 1.0,
    weights: Sequence[float] = SCALE_WEIGHTS,
    offset: float = 0.0,
    first: tuple[Tensor, Tensor] | None = None,
) -> Float[Tensor, "b"]:
    """Multi-scale SSIM, mean over channels: negative factors as zero, sides halved by 2 x 2 means between scales.

    Both sides need at least 11 pixels at the coarsest scale. offset: as of `ssim_parts`. first: what that finds for
    these images with a Gaussian line, where it is known. Source: Wang, Simoncelli and Bovik 2003, eq. 7.
    """
    line, factors = gaussian_line(), []
    for index in range(len(weights)):
        if index:
            a, b = halved(a), halved(b)
        known = first if index == 0 else None
        whole, contrast = ssim_parts(a, b, line, data_range, offset=offset) if known is None else known
        factors.append((whole if index == len(weights) - 1 else contrast).clamp_min(0))
    exponents = torch.tensor(tuple(weights), dtype=torch.float64).view(-1, 1, 1).to(factors[0])
    return (torch.stack(factors) ** exponents).prod(0).mean(1)


def halved(x: Float[Tensor, "*b h w"]) -> Float[Tensor, "*b u v"]:
    """Means of 2 x 2 pixels; the last of an odd number of rows or columns is left out."""
    height, width = x.shape[-2] // 2 * 2, x.shape[-1] // 2 * 2
    rows = x[..., 0:height:2, :width] + x[..., 1:height:2, :width]
    return (rows[..., 0::2] + rows[..., 1::2]).mul_(0.25)


def structure_and_texture(
    x: Sequence[Float[Tensor, "b _ _ _"]],
    y: Sequence[Float[Tensor, "b _ _ _"]],
    alpha: Float[Tensor, "c"],
    beta: Float[Tensor, "c"],
) -> Float[Tensor, "b"]:
    """DISTS from feature maps of both: 1 - sum of alpha * texture + beta * structure (arXiv 2004.07728, eq. 6-8).

    x, y: maps of all layers, the image itself first. alpha, beta: one weight for every channel of all of them; they are
    divided by their common sum.
    """
    total = alpha.sum() + beta.sum()
    similarity, start = x[0].new_zeros(len(x[0])), 0
    for one, other in zip(x, y, strict=True):
        end = start + one.shape[1]
        mean_x, mean_y = one.mean((2, 3)), other.mean((2, 3))
        var_x, var_y = one.var((2, 3), correction=0), other.var((2, 3), correction=0)
        covariance = (one * other).mean((2, 3)) - mean_x * mean_y
        texture = (2 * mean_x * mean_y + 1e-6) / (mean_x.square() + mean_y.square() + 1e-6)
        structure = (2 * covariance + 1e-6) / (var_x + var_y + 1e-6)
        similarity = similarity + (alpha[start:end] * texture + beta[start:end] * structure).sum(1) / total
        start = end
    return 1 - similarity
