"""Steps at the edges of patches and patterns of plain areas: small ones go, large ones and slopes stay."""

import itertools

import pytest
import torch

from tokenizers_mm.functional.deblocking import deblock, smooth_plain


def steps(height: float) -> torch.Tensor:
    """Two flat patches side by side, twice below each other."""
    x = torch.zeros(1, 3, 16, 16)
    x[..., 8:] = height
    return x


def test_a_small_step_becomes_a_ramp() -> None:
    y = deblock(steps(0.02), 8, 0.2)
    assert float((y[..., 8] - y[..., 7]).abs().max()) < 0.001
    assert float((y[..., 1:] - y[..., :-1]).max()) < 0.011
    torch.testing.assert_close(y.mean(), steps(0.02).mean())
    assert torch.equal(y[..., :5], steps(0.02)[..., :5])


def test_a_large_step_and_a_slope_stay() -> None:
    torch.testing.assert_close(deblock(steps(1.0), 8, 0.2), steps(1.0))
    slope = torch.arange(16.0).expand(1, 3, 16, 16) / 16
    torch.testing.assert_close(deblock(slope, 8, 0.2), slope)


def test_rows_and_columns_are_alike() -> None:
    x = torch.rand(2, 3, 16, 24, generator=torch.Generator().manual_seed(0)) * 0.1
    torch.testing.assert_close(
        deblock(steps(0.02).transpose(-1, -2), 8, 0.2).transpose(-1, -2), deblock(steps(0.02), 8, 0.2)
    )
    assert deblock(x, 8, 0.2).shape == x.shape


def test_gradients_are_those_of_the_formula() -> None:
    x = torch.rand(1, 2, 6, 12, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 0.2
    assert torch.autograd.gradcheck(lambda v: deblock(v, 6, 0.3), (x.requires_grad_(),))


@pytest.mark.parametrize("patch", [6, 8])
def test_every_inner_edge_is_seen(patch: int) -> None:
    x = torch.zeros(1, 1, 2 * patch, 3 * patch)
    x[..., patch : 2 * patch] = 0.02
    y = deblock(x, patch, 0.5)
    for edge in (patch, 2 * patch):
        assert float((y[..., edge] - y[..., edge - 1]).abs().max()) < 1e-3


def pattern(patch: int, size: float) -> torch.Tensor:
    """Five by five times one random patch of mean 0, uniform in [-size, size] before the mean is taken off."""
    tile = (
        torch.rand(1, 3, patch, patch, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 2 - 1
    ) * size
    return (tile - tile.mean((-1, -2), keepdim=True)).repeat(1, 1, 5, 5)


@pytest.mark.parametrize("patch", [4, 5, 8])
def test_a_small_pattern_goes_and_a_large_one_stays(patch: int) -> None:
    inner = slice(2 * patch, 3 * patch)  # means of two windows around these pixels are those of whole patches
    small, large = pattern(patch, 0.01), pattern(patch, 1.0)
    variance = small.square().mean()
    expected = small * variance / (variance + 0.05**2)
    torch.testing.assert_close(
        smooth_plain(small + 0.3, patch, 0.05)[..., inner, inner] - 0.3, expected[..., inner, inner]
    )
    assert float(expected.abs().max()) < 0.02 * float(small.abs().max())
    torch.testing.assert_close(smooth_plain(large, patch, 0.05), large, rtol=0, atol=0.02)


def test_smoothing_is_the_guided_filter_of_the_paper() -> None:
    x = torch.rand(1, 2, 7, 10, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    patch, threshold = 4, 0.3

    def mean(image: torch.Tensor) -> torch.Tensor:
        """Mean of the means of the windows that begin 2 and 1 pixels before each one, per axis; cut at the border."""
        for axis in (-1, -2):
            length = image.shape[axis]
            means = [
                image.narrow(axis, max(i - 2, 0), min(i + 2, length) - max(i - 2, 0)).mean(axis)
                for i in range(length + 1)
            ]
            image = torch.stack([(a + b) / 2 for a, b in itertools.pairwise(means)], axis)
        return image

    variance = (mean(x**2) - mean(x) ** 2).mean(1, keepdim=True)
    a = variance / (variance + threshold**2)
    b = mean(x) - a * mean(x)
    torch.testing.assert_close(smooth_plain(x, patch, threshold), mean(a) * x + mean(b))


def test_smoothing_has_gradients_and_keeps_half_precision() -> None:
    x = torch.rand(1, 2, 5, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 0.2
    assert torch.autograd.gradcheck(lambda v: smooth_plain(v, 4, 0.1), (x.requires_grad_(),))
    half = (pattern(8, 0.05) + 0.5).to(torch.bfloat16)
    y = smooth_plain(half, 8, 0.05)
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y, smooth_plain(half.float(), 8, 0.05).to(torch.bfloat16))
    with torch.autocast("cpu"):
        torch.testing.assert_close(smooth_plain(half, 8, 0.05), y)
