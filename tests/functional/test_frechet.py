"""Distances of sets of features against scipy and against torch-fidelity, written by others."""

import numpy as np
import pytest
import torch
from scipy.linalg import sqrtm

from tokenizers_mm.functional.frechet import Moments, frechet_distance, inception_score, kernel_distance


def features(count: int = 300, dim: int = 24) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    mix = torch.randn(dim, dim, generator=generator, dtype=torch.float64)
    a = torch.randn(count, dim, generator=generator, dtype=torch.float64) @ mix + 30
    b = torch.randn(count, dim, generator=generator, dtype=torch.float64) @ (mix + 0.1) + 30.5
    return a, b


def of_moments(a: torch.Tensor, b: torch.Tensor, batch: int) -> float:
    sides = []
    for x in (a, b):
        moments = Moments()
        for part in x.split(batch):
            moments.add(part)
        sides += moments.mean_and_covariance()
    return frechet_distance(*sides)


@pytest.mark.parametrize("batch", [1, 7, 300])
def test_frechet_distance_equals_scipy_whatever_the_batch(batch: int) -> None:
    a, b = features()
    (m1, c1), (m2, c2) = ((x.numpy().mean(0), np.cov(x.numpy(), rowvar=False)) for x in (a, b))
    expected = np.square(m1 - m2).sum() + np.trace(c1 + c2 - 2 * np.real(sqrtm(c1 @ c2)))
    assert of_moments(a, b, batch) == pytest.approx(expected, rel=1e-9)


def test_frechet_distance_equals_torch_fidelity() -> None:
    fid = pytest.importorskip("torch_fidelity.metric_fid", reason="the peer is torch-fidelity")
    a, b = features()
    theirs = fid.fid_statistics_to_metric(
        fid.fid_features_to_statistics(a), fid.fid_features_to_statistics(b), verbose=False
    )
    assert of_moments(a, b, 50) == pytest.approx(theirs[fid.KEY_METRIC_FID], rel=1e-9)


def test_frechet_distance_of_few_features() -> None:
    """Singular covariances, fewer features than dimensions: equal sets are at distance zero."""
    a, _ = features(count=8)
    assert abs(of_moments(a, a, 3)) < 1e-7 * float(torch.cov(a.T).trace())


def test_kernel_distance_equals_torch_fidelity() -> None:
    kid = pytest.importorskip("torch_fidelity.metric_kid", reason="the peer is torch-fidelity")
    a, b = features(60)
    options = {"kid_kernel": "poly", "kid_kernel_poly_degree": 3, "kid_kernel_poly_coef0": 1.0}
    theirs = kid.kernel_mmd(a.numpy(), b.numpy(), kid_kernel_poly_gamma=None, **options)
    assert kernel_distance(a, b) == pytest.approx(float(theirs), rel=1e-9)


def test_inception_score_equals_torch_fidelity() -> None:
    isc = pytest.importorskip("torch_fidelity.metric_isc", reason="the peer is torch-fidelity")
    logits = torch.randn(50, 10, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 3
    chances = logits.softmax(1)
    ours = inception_score(50, chances.sum(0), float(torch.special.entr(chances).sum()))
    theirs = isc.isc_features_to_metric(logits, splits=1)[isc.KEY_METRIC_ISC_MEAN]
    assert ours == pytest.approx(theirs, rel=1e-9)
