"""Measures of how alike two images are, per image: PSNR, SSIM, MS-SSIM, the comparison of features of DISTS."""

from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

SCALE_WEIGHTS = (0.0448, 0.2856, 0.3001, 0.2363, 0.1333)
"""Exponents of MS-SSIM's five scales (Wang, Simoncelli and Bovik 2003, section 3.2)."""


FLOAT32_ERROR = 0.02
"""Mean squared difference of a channel, for a data range of 1, up to which SSIM is computed in float32."""


def gaussian_line(size: int = 11, sigma: float = 1.5) -> Float[Tensor, "k"]:
    """Weights of a Gaussian window along one axis, float64, sum 1."""
    steps = torch.arange(size, dtype=torch.float64) - (size - 1) / 2
    line = torch.exp(-steps.square() / (2 * sigma**2))
    return line / line.sum()


def uniform_line(size: int = 7) -> Float[Tensor, "k"]:
    """Weights of a uniform window along one axis, float64, sum 1."""
    return torch.full((size,), 1 / size, dtype=torch.float64)


def correlate(
    x: Float[Tensor, "h w"],
    line: Float[Tensor, "k"],
    rows: Float[Tensor, "v w"] | None = None,
    out: Float[Tensor, "v u"] | None = None,
) -> Float[Tensor, "v u"]:
    """Separable correlation with the same line along both axes, only where it lies inside: [h - k + 1, w - k + 1].

    Sums of shifted views: one map of a usual size stays in a processor's cache, and no sum depends on the batch.
    rows, out: memory for the result along the first axis and for the whole result; new memory where they are None.
    """
    weights = line.tolist()
    if len(set(weights)) == 1:
        return torch.mul(window_sums(x, len(weights)), weights[0] ** 2, out=out)
    for axis, memory in ((0, rows), (1, out)):
        length = x.shape[axis] - len(weights) + 1
        total = torch.mul(x.narrow(axis, 0, length), weights[0], out=memory)
        for offset, weight in enumerate(weights[1:], 1):
            total.add_(x.narrow(axis, offset, length), alpha=weight)
        x = total
    return x


def window_sums(x: Float[Tensor, "h w"], size: int) -> Float[Tensor, "v u"]:
    """Sums over all windows of size x size inside a map, from sums over 1, 2, 4, ... neighbours."""
    for axis in (0, 1):
        length = x.shape[axis] - size + 1
        total, start, width, sums = x.new_zeros(()), 0, 1, x
        while start < size:
            if size & width:
                total = total + sums.narrow(axis, start, length)
                start += width
            if start < size:
                sums = sums.narrow(axis, 0, sums.shape[axis] - width) + sums.narrow(
                    axis, width, sums.shape[axis] - width
                )
                width *= 2
        x = total
    return x


def decibel(error: Float[Tensor, "*b"], data_range: float = 1.0) -> Float[Tensor, "*b"]:
    """Peak signal-to-noise ratio of mean squared errors, in dB; infinite for zero."""
    return 10 * (data_range**2 / error).log10()


def ssim_parts(
    a: Float[Tensor, "b c h w"],
    b: Float[Tensor, "b c h w"],
    line: Float[Tensor, "k"],
    data_range: float = 1.0,
    sample_covariance: bool = False,
) -> tuple[Float[Tensor, "b c"], Float[Tensor, "b c"]]:
    """Means over windows of SSIM and of its contrast-structure factor, by image and channel (Wang et al. 2004, eq. 13).

    line: of the window along one axis; only windows inside the image count. K1 is 0.01 and K2 0.03.
    sample_covariance: variances of a window of n pixels are multiplied by n / (n - 1), as scikit-image does by default.

    Both factors are written as 1 - (difference of moments) / (sum of moments), from maps of x - y and of x + y less its
    mean. The rounding errors of float32 then reach the result only in proportion to what is lost, and it equals that of
    float64 to 1e-6; channels with a mean squared difference above FLOAT32_ERROR are computed in float64.
    """
    count = len(line) ** 2
    scale = count / (count - 1) if sample_covariance else 1.0
    constants = (0.01 * data_range) ** 2, (0.03 * data_range) ** 2 / scale
    whole, contrast = torch.empty(2, *a.shape[:2], dtype=torch.float64, device=a.device)
    memory = _SSIMMaps(a, len(line))
    for image in range(a.shape[0]):
        for channel in range(a.shape[1]):
            x, y = a[image, channel], b[image, channel]
            maps = memory
            if x.dtype != torch.float64 and float(F.mse_loss(x, y)) > FLOAT32_ERROR * data_range**2:
                x, y = x.double(), y.double()
                maps = _SSIMMaps(x, len(line))
            whole[image, channel], contrast[image, channel] = maps.measure(x, y, line, *constants)
    return whole, contrast


class _SSIMMaps:
    """Maps that the channels of images of one size are measured with: new memory for each would cost a third more."""

    def __init__(self, like: Tensor, size: int) -> None:
        """like: images [..., H, W]. size: pixels along a side of the window."""
        height, width = like.shape[-2:]
        self.whole = like.new_empty(2, height, width)
        self.rows = like.new_empty(height - size + 1, width)
        self.inner = like.new_empty(4, height - size + 1, width - size + 1)

    def measure(self, x: Tensor, y: Tensor, line: Tensor, c1: float, c2: float) -> tuple[float, float]:
        """Means over windows of SSIM and of its contrast-structure factor, of maps x and y [H, W]."""
        mean = float(x.mean())
        difference = torch.sub(x, y, out=self.whole[0])
        total = torch.add(x, y, out=self.whole[1]).sub_(2 * mean)
        gap, sums, variance, both = (
            correlate(moment, line, self.rows, out)
            for moment, out in zip(_moments(difference, total), self.inner, strict=True)
        )
        variance.addcmul_(gap, gap, value=-1)
        both.addcmul_(sums, sums, value=-1).add_(variance)
        contrast = variance.div_(both.mul_(0.5).add_(c2))
        gap.square_()
        light = sums.add_(2 * mean).square_().add_(gap).mul_(0.5).add_(c1).reciprocal_().mul_(gap)
        lost = _mean(contrast)
        return 1 - _mean(light.addcmul_(light, contrast, value=-1).add_(contrast)), 1 - lost


def _moments(*maps: Tensor) -> Iterator[Tensor]:
    """Maps, and then their squares in the same memory."""
    yield from maps
    for each in maps:
        yield each.square_()


def _mean(x: Float[Tensor, "v u"]) -> float:
    """Mean of a map, the sums of rows added in float64."""
    return float(x.sum(1).double().sum()) / x.numel()


def ms_ssim(
    a: Float[Tensor, "b c h w"],
    b: Float[Tensor, "b c h w"],
    data_range: float = 1.0,
    weights: Sequence[float] = SCALE_WEIGHTS,
) -> Float[Tensor, "b"]:
    """Multi-scale SSIM, mean over channels: negative factors as zero, sides halved by 2 x 2 means between scales.

    Both sides need at least 11 pixels at the coarsest scale. Source: Wang, Simoncelli and Bovik 2003, eq. 7.
    """
    line, factors = gaussian_line(), []
    for index in range(len(weights)):
        whole, contrast = ssim_parts(a, b, line, data_range)
        factors.append((whole if index == len(weights) - 1 else contrast).clamp_min(0))
        a, b = F.avg_pool2d(a, 2), F.avg_pool2d(b, 2)
    exponents = torch.tensor(tuple(weights), dtype=torch.float64).view(-1, 1, 1).to(factors[0])
    return (torch.stack(factors) ** exponents).prod(0).mean(1)


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
