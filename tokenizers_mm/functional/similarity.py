"""Measures of how alike two images are, per image: PSNR, SSIM, MS-SSIM, the comparison of features of DISTS."""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

SCALE_WEIGHTS = (0.0448, 0.2856, 0.3001, 0.2363, 0.1333)
"""Exponents of MS-SSIM's five scales (Wang, Simoncelli and Bovik 2003, section 3.2)."""


FLOAT32_ERROR = 0.02
"""Mean squared difference of a channel, for a data range of 1, up to which SSIM is computed in float32."""


BLOCK = 32
"""Rows or columns that are correlated by one product of matrices."""


def gaussian_line(size: int = 11, sigma: float = 1.5) -> Float[Tensor, "k"]:
    """Weights of a Gaussian window along one axis, float64, sum 1."""
    steps = torch.arange(size, dtype=torch.float64) - (size - 1) / 2
    line = torch.exp(-steps.square() / (2 * sigma**2))
    return line / line.sum()


def uniform_line(size: int = 7) -> Float[Tensor, "k"]:
    """Weights of a uniform window along one axis, float64, sum 1."""
    return torch.full((size,), 1 / size, dtype=torch.float64)


def correlate(
    x: Float[Tensor, "h n w"],
    line: Float[Tensor, "k"],
    rows: Float[Tensor, "v n w"] | None = None,
    out: Float[Tensor, "v n u"] | None = None,
) -> Float[Tensor, "v n u"]:
    """Separable correlation of n maps with the same line along both axes, only where it lies inside.

    Products with a band matrix, BLOCK rows or columns at a time: each value is read once, not once per weight, and no
    sum depends on other maps. rows, out: memory for the result along the first axis and for the whole result.
    """
    height, maps, width = x.shape
    inside = height - len(line) + 1, width - len(line) + 1
    rows = x.new_empty(inside[0], maps, width) if rows is None else rows
    out = x.new_empty(inside[0], maps, inside[1]) if out is None else out
    reach = len(line) - 1
    band = x.new_zeros(BLOCK, BLOCK + reach)
    band.as_strided((BLOCK, len(line)), (BLOCK + reach + 1, 1)).copy_(line.to(x))
    flat, flat_rows = x.reshape(height, -1), rows.view(inside[0], -1)
    for start in range(0, inside[0], BLOCK):
        end = min(start + BLOCK, inside[0])
        torch.mm(band[: end - start, : end - start + reach], flat[start : end + reach], out=flat_rows[start:end])
    flat_rows, flat, band = rows.view(-1, width), out.view(-1, inside[1]), band.T.contiguous()
    for start in range(0, inside[1], BLOCK):
        end = min(start + BLOCK, inside[1])
        part = band[: end - start + reach, : end - start]
        torch.mm(flat_rows[:, start : end + reach], part, out=flat[:, start:end])
    return out


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
    float64 to 1e-6; channels with a mean squared difference above FLOAT32_ERROR are computed in float64, and so are all
    where products of float32 matrices may be less exact (`torch.set_float32_matmul_precision`).
    """
    count = len(line) ** 2
    scale = count / (count - 1) if sample_covariance else 1.0
    constants = (0.01 * data_range) ** 2, (0.03 * data_range) ** 2 / scale
    found = torch.empty(2, *a.shape[:2], dtype=torch.float64, device=a.device)
    most = FLOAT32_ERROR * data_range**2 if torch.get_float32_matmul_precision() == "highest" else -1.0
    maps = _SSIMMaps(a, line)
    with torch.autocast(a.device.type, enabled=False):
        for image in range(a.shape[0]):
            for channel in range(a.shape[1]):
                x, y = a[image, channel], b[image, channel]
                values = maps.measure(x, y, *constants, most)
                found[:, image, channel] = found.new_tensor(
                    values or _SSIMMaps(x.double(), line).measure(x.double(), y.double(), *constants)
                )
    return found[0], found[1]


class _SSIMMaps:
    """Four maps side by side, with which all channels of one size are measured: memory that is not taken anew.

    Equal weights are taken as ones, and means, variances and constants as so many times larger: 1 / 7 in float32 would
    bias every variance alike.
    """

    def __init__(self, like: Tensor, line: Tensor) -> None:
        """like: images [..., H, W]. line: of the window along one axis."""
        height, width = like.shape[-2:]
        equal = bool((line == line[0]).all())
        self.line, self.mass = (torch.ones_like(line), len(line) ** 2) if equal else (line, 1)
        self.maps = like.new_empty(height, 4, width)
        self.rows = like.new_empty(height - len(line) + 1, 4, width)
        self.inside = like.new_empty(height - len(line) + 1, 4, width - len(line) + 1)

    def measure(self, x: Tensor, y: Tensor, c1: float, c2: float, most: float = math.inf) -> tuple[float, float] | None:
        """Means over windows of SSIM and of its contrast-structure factor, of maps x and y [H, W].

        None for float32 maps with a mean squared difference above `most`.
        """
        mean = float(x.mean())
        torch.sub(x, y, out=self.maps[:, 0])
        torch.add(x, y, out=self.maps[:, 1]).sub_(2 * mean)
        torch.mul(self.maps[:, :2], self.maps[:, :2], out=self.maps[:, 2:])
        if x.dtype != torch.float64 and float(self.maps[:, 2].mean()) > most:
            return None
        gap, total, variance, both = correlate(self.maps, self.line, self.rows, self.inside).unbind(1)
        c1, c2, mean = c1 * self.mass**2, c2 * self.mass**2, mean * self.mass
        if self.mass != 1:
            variance, both = variance.mul_(self.mass), both.mul_(self.mass)
        variance.addcmul_(gap, gap, value=-1)
        both.addcmul_(total, total, value=-1).add_(variance)
        contrast = variance.div_(both.mul_(0.5).add_(c2))
        gap.square_()
        light = total.add_(2 * mean).square_().add_(gap).mul_(0.5).add_(c1).reciprocal_().mul_(gap)
        lost = _mean(contrast)
        return 1 - _mean(light.addcmul_(light, contrast, value=-1).add_(contrast)), 1 - lost


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
