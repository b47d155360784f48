"""PSNR and SSIM against scikit-image, which was written by others, on 50 images of 5 sizes; rules of all metrics."""

from io import BytesIO

import numpy as np
import pytest
import torch
from PIL import Image
from skimage.metrics import peak_signal_noise_ratio, structural_similarity

from tokenizers_mm._images import image_to_tensor
from tokenizers_mm.data.photographs import fixed_crops
from tokenizers_mm.eval import image as metric

SIZES = ((64, 64), (96, 96), (61, 83), (48, 120), (128, 72))
GAUSSIAN = {"gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": False}


def pair(noise: float) -> tuple[torch.Tensor, torch.Tensor]:
    a = torch.stack([image_to_tensor(crop) for crop in fixed_crops("heldout", 6, 48)])
    b = a + noise * torch.randn(a.shape, generator=torch.Generator().manual_seed(0))
    return a, b.clamp(-1, 1)


@pytest.mark.parametrize("size", SIZES)
def test_psnr_and_ssim_equal_scikit_image(size: tuple[int, int]) -> None:
    height, width = size
    for index, crop in enumerate(fixed_crops("heldout", 10, 128)):
        original = crop.crop((0, 0, width, height))
        stream = BytesIO()
        original.save(stream, "JPEG", quality=(5, 15, 40, 70, 90)[index % 5])
        decoded = Image.open(stream).convert("RGB")
        x, y = (np.asarray(image) / 255 for image in (original, decoded))
        a, b = (image_to_tensor(image)[None] for image in (original, decoded))
        assert float(metric.psnr(a, b)) == pytest.approx(peak_signal_noise_ratio(x, y, data_range=1), abs=1e-6)
        for window, data_range, options in (
            ("gaussian", 1.0, GAUSSIAN),
            ("uniform7", 1.0, {}),
            ("uniform7", 2.0, {}),
            ("uniform8", 1.0, None),
        ):
            ours = float(metric.ssim(a, b, window, data_range))  # type: ignore[arg-type]
            if options is None:  # an even window, which scikit-image has not
                assert 0 < ours < 1
                continue
            theirs = structural_similarity(x, y, channel_axis=2, data_range=data_range, **options)
            assert ours == pytest.approx(float(theirs), abs=1e-6)  # type: ignore[arg-type]


def hard_pairs() -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Pairs of images, 8 bits [64, 64, 3], for which the rounding of float32 would matter most."""
    rng = np.random.default_rng(0)
    bright = np.full((64, 64, 3), 245, dtype=np.uint8)
    page = bright.copy()
    page[:, :30] = 6
    ramp = np.broadcast_to(np.arange(64, dtype=np.uint8)[None, :, None] * 4, bright.shape)
    noise = rng.integers(0, 256, bright.shape, dtype=np.uint8)
    return {
        "one step": (bright, bright - 1),
        "white to black": (bright, 255 - bright),
        "half of it": (page, np.where(page == 6, page + 30, page).astype(np.uint8)),
        "half swapped": (page, np.ascontiguousarray(page[:, ::-1])),
        "weak noise": (page, (page + rng.integers(0, 5, page.shape)).astype(np.uint8)),
        "bands": (np.ascontiguousarray(ramp), ramp // 16 * 16),
        "noise": (noise, rng.integers(0, 256, bright.shape, dtype=np.uint8)),
        "specks": (bright, np.where(noise > 240, noise, bright)),
    }


def test_float32_costs_no_digit_that_counts() -> None:
    """Flat, bright and badly wrong images still equal scikit-image, which computes in float64, to 1e-6."""
    for name, (x, y) in hard_pairs().items():
        a, b = (image_to_tensor(Image.fromarray(image))[None] for image in (x, y))
        x, y = x / 255, y / 255
        psnr = float(peak_signal_noise_ratio(x, y, data_range=1))
        assert float(metric.psnr(a, b)) == pytest.approx(psnr, abs=2e-5 if name == "one step" else 1e-6), name
        for window, options in (("gaussian", GAUSSIAN), ("uniform7", {})):
            ours = float(metric.ssim(a, b, window))  # type: ignore[arg-type]
            theirs = structural_similarity(x, y, channel_axis=2, data_range=1, **options)  # type: ignore[arg-type]
            assert ours == pytest.approx(float(theirs), abs=1e-6), (name, window)  # type: ignore[arg-type]
            precise = float(metric.ssim(a.double(), b.double(), window))  # type: ignore[arg-type]
            assert ours == pytest.approx(precise, abs=1e-6), (name, window)


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
    kept = b.clone()
    metric.psnr(a.double(), kept.double())
    assert torch.equal(kept, b)
    b[0, 0, 0, 0] = torch.nan
    with pytest.raises(ValueError, match="b: expected finite values, got NaN"):
        metric.psnr(a, b)
    with pytest.raises(ValueError, match=r"b: expected float \[6, 3, 48, 48\]"):
        metric.ssim(a, b[:3])
    with pytest.raises(ValueError, match="a: expected images of at least 176 x 176 pixels"):
        metric.ms_ssim(a, a)
    with pytest.raises(ValueError, match="window: expected one of"):
        metric.ssim(a, a, "round")  # type: ignore[arg-type]
