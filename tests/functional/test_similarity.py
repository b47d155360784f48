"""Formulas of similarity against plain ones in float64, and against hand-made cases."""

import torch

from tokenizers_mm.functional.similarity import (
    SCALE_WEIGHTS,
    decibel,
    gaussian_line,
    ms_ssim,
    ssim_parts,
    structure_and_texture,
    uniform_line,
)


def images(seed: int, side: int, count: int = 1) -> torch.Tensor:
    return torch.rand(count, 1, side, side, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def test_ssim_of_one_window_is_the_formula() -> None:
    """Equation 13 of Wang et al. 2004 over an image that holds one window."""
    a, b = images(1, 7), images(2, 7)
    whole, contrast = ssim_parts(a, b, uniform_line(7), sample_covariance=True)
    x, y = a.flatten(), b.flatten()
    covariance = torch.cov(torch.stack([x, y]))
    light = (2 * x.mean() * y.mean() + 1e-4) / (x.mean() ** 2 + y.mean() ** 2 + 1e-4)
    factor = (2 * covariance[0, 1] + 9e-4) / (covariance[0, 0] + covariance[1, 1] + 9e-4)
    torch.testing.assert_close(contrast.flatten()[0], factor, rtol=1e-12, atol=0)
    torch.testing.assert_close(whole.flatten()[0], factor * light, rtol=1e-12, atol=0)


def test_multi_scale_ssim_is_the_product_of_its_scales() -> None:
    a = images(3, 192)
    b = (a + 0.1 * images(4, 192)).clamp(0, 1)
    expected, x, y = torch.ones(1, dtype=torch.float64), a, b
    for index, weight in enumerate(SCALE_WEIGHTS):
        whole, contrast = ssim_parts(x, y, gaussian_line())
        expected = expected * (whole if index == 4 else contrast)[:, 0] ** weight
        x, y = (t.unfold(2, 2, 2).unfold(3, 2, 2).mean((4, 5)) for t in (x, y))
    torch.testing.assert_close(ms_ssim(a, b), expected, rtol=1e-12, atol=0)
    torch.testing.assert_close(ms_ssim(a, a), torch.ones(1, dtype=torch.float64))
    assert float(ms_ssim(a, 1 - a)) == 0.0, "negative structure counts as none"


def test_decibels() -> None:
    torch.testing.assert_close(decibel(torch.tensor([0.01, 1.0, 0.0])), torch.tensor([20.0, 0.0, torch.inf]))


def test_structure_and_texture_of_known_maps() -> None:
    """Maps that differ by a constant: structure is 1, texture follows from the means alone."""
    x, y = (torch.full((1, 2, 4, 4), level, dtype=torch.float64) for level in (0.5, 1.0))
    x, y = x + 0.1 * torch.eye(4), y + 0.1 * torch.eye(4)
    alpha, beta = torch.tensor([1.0, 0.0]).double(), torch.tensor([0.0, 3.0]).double()
    means = 0.525, 1.025
    texture = (2 * means[0] * means[1] + 1e-6) / (means[0] ** 2 + means[1] ** 2 + 1e-6)
    distance = structure_and_texture([x], [y], alpha, beta)
    torch.testing.assert_close(distance, torch.tensor([1 - (texture + 3) / 4], dtype=torch.float64))
    torch.testing.assert_close(structure_and_texture([x], [x], alpha, beta), torch.zeros(1, dtype=torch.float64))
