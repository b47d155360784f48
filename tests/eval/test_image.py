"""PSNR and SSIM against scikit-image, which was written by others."""

import numpy as np
import pytest
import torch
from skimage.metrics import peak_signal_noise_ratio, structural_similarity

from tokenizers_mm._images import image_to_tensor
from tokenizers_mm.data.photographs import fixed_crops
from tokenizers_mm.eval import image as metric


def pair(noise: float) -> tuple[torch.Tensor, torch.Tensor]:
    a = torch.stack([image_to_tensor(crop) for crop in fixed_crops("heldout", 6, 48)])
    b = a + noise * torch.randn(a.shape, generator=torch.Generator().manual_seed(0))
    return a, b.clamp(-1, 1)


def _ssim_map(x: np.ndarray, y: np.ndarray, options: dict) -> np.ndarray:
    result = structural_similarity(x, y, channel_axis=2, full=True, **options)
    assert isinstance(result, tuple)
    return np.asarray(result[1])


@pytest.mark.parametrize("noise", [0.01, 0.1, 0.5])
def test_psnr_and_ssim_equal_scikit_image(noise: float) -> None:
    a, b = pair(noise)
    for index in range(len(a)):
        x, y = (((t[index].double() + 1) / 2).permute(1, 2, 0).numpy() for t in (a, b))
        expected = peak_signal_noise_ratio(x, y, data_range=1.0)
        assert metric.psnr(a, b)[index] == pytest.approx(expected, abs=1e-9)
        options = {"gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": False, "data_range": 1.0}
        score, full = np.asarray(structural_similarity(x, y, channel_axis=2, **options)), _ssim_map(x, y, options)
        inside = full[5:-5, 5:-5].mean()  # windows that lie inside the image
        assert metric.ssim(a, b)[index] == pytest.approx(inside, abs=2e-6)  # it truncates its window at 3.5 sigma
        assert abs(float(metric.ssim(a, b)[index]) - score) < 0.02


def test_metrics_are_per_image_and_do_not_depend_on_the_batch() -> None:
    a, b = pair(0.1)
    for measure in (metric.psnr, metric.ssim):
        together = measure(a, b)
        assert together.shape == (6,)
        torch.testing.assert_close(together, torch.cat([measure(a[i : i + 1], b[i : i + 1]) for i in range(6)]))
    assert torch.isinf(metric.psnr(a, a)).all()
    torch.testing.assert_close(metric.ssim(a, a), torch.ones(6, dtype=torch.float64))


def test_values_outside_the_range_are_clamped_and_nan_is_an_error() -> None:
    a, b = pair(0.1)
    torch.testing.assert_close(metric.psnr(a, b + 5 * (b >= 1)), metric.psnr(a, b))
    b[0, 0, 0, 0] = torch.nan
    with pytest.raises(ValueError, match="b: expected finite values, got NaN"):
        metric.psnr(a, b)
    with pytest.raises(ValueError, match=r"b: expected float \[6, 3, 48, 48\]"):
        metric.ssim(a, b[:3])
