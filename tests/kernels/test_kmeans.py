"""kmeans against k-means written out in numpy, and what it promises beside: same bits, no empty codes, repeats."""

import numpy as np
import pytest
import torch
from torch import Tensor

from tokenizers_mm import kernels
from tokenizers_mm.kernels import _native

MODES = [
    "reference",
    pytest.param(
        "native", marks=pytest.mark.skipif(_native.cpu_or_none() is None, reason="the native library is not installed")
    ),
]


def blobs(n: int = 900, d: int = 6, groups: int = 12, seed: int = 0) -> Tensor:
    g = torch.Generator().manual_seed(seed)
    centres = torch.randn(groups, d, generator=g) * 8
    return centres[torch.randint(0, groups, (n,), generator=g)] + torch.randn(n, d, generator=g)


def lloyd(z: np.ndarray, codes: np.ndarray, iterations: int) -> tuple[np.ndarray, float]:
    """Lloyd's algorithm in float64; stops for a code without rows, which the data of the test do not have."""
    for _ in range(iterations):
        ids = ((z[:, None] - codes) ** 2).sum(-1).argmin(1)
        assert len(np.unique(ids)) == len(codes)
        codes = np.stack([z[ids == code].mean(0) for code in range(len(codes))])
    return codes, float(((z[:, None] - codes) ** 2).sum(-1).min(1).sum())


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_lloyd(dtype: torch.dtype, mode: str) -> None:
    z = blobs().to(dtype)
    start = z[:40]
    with kernels.use_kernels(mode):
        found = kernels.kmeans(z, 40, init=start, iterations=12, tolerance=-1.0)
        ids, distance = kernels.nearest_code(z, found.codebook, return_distance=True)
    codes, inertia = lloyd(z.double().numpy(), start.double().numpy(), found.iterations)
    assert found.inertia == pytest.approx(inertia, rel=1e-6)
    torch.testing.assert_close(found.codebook.double(), torch.from_numpy(codes), rtol=1e-5, atol=1e-5)
    assert torch.equal(found.ids, ids)
    assert found.inertia == pytest.approx(float(distance.double().sum()))
    assert found.codebook.dtype == dtype


@pytest.mark.parametrize("init", ["k-means++", "random"])
@pytest.mark.parametrize("batch_size", [None, 256])
def test_same_bits_for_any_threads_and_either_path(
    init: str, batch_size: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    z = blobs(3000, 16)
    results = []
    for threads in (1, 2, 5):
        monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
        results.append(kernels.kmeans(z, 300, init=init, batch_size=batch_size, iterations=6, seed=3))
    with kernels.use_kernels("reference"):
        results.append(kernels.kmeans(z, 300, init=init, batch_size=batch_size, iterations=6, seed=3))
    for result in results[1:]:
        assert torch.equal(result.codebook, results[0].codebook)
        assert torch.equal(result.ids, results[0].ids)
        assert result.inertia == results[0].inertia
    other = kernels.kmeans(z, 300, init=init, batch_size=batch_size, iterations=6, seed=4)
    assert not torch.equal(other.codebook, results[0].codebook)


def test_better_starts_and_every_code_used() -> None:
    z = blobs(4000, 8, groups=60, seed=1)
    spread = kernels.kmeans(z, 60, iterations=0)
    random = kernels.kmeans(z, 60, init="random", iterations=0)
    assert spread.inertia < 0.8 * random.inertia
    for batch_size in (None, 500):
        bad_start = z[:1].repeat(60, 1) + torch.arange(60)[:, None] * 1e-3
        found = kernels.kmeans(z, 60, init=bad_start, iterations=30, batch_size=batch_size)
        assert len(found.ids.unique()) > 50
        assert found.inertia < 3 * kernels.kmeans(z, 60, batch_size=batch_size).inertia


def test_small_and_odd_inputs() -> None:
    same = torch.ones(10, 3)
    found = kernels.kmeans(same, 4)
    assert torch.equal(found.codebook, torch.ones(4, 3))
    assert found.inertia == 0.0
    z = torch.randn(5, 2)
    every = kernels.kmeans(z, 5)
    assert every.inertia == 0.0
    assert sorted(every.ids.tolist()) == list(range(5))
    half = kernels.kmeans(z.half().t().contiguous().t(), 2)
    assert half.codebook.dtype == torch.float32
    with pytest.raises(ValueError, match="num_codes: expected 1 to 5"):
        kernels.kmeans(z, 6)
    with pytest.raises(ValueError, match=r"init: expected \"k-means\+\+\", \"random\" or a tensor"):
        kernels.kmeans(z, 2, init="best")
    with pytest.raises(ValueError, match=r"init: expected float \[2, 2\], got float32 \[3, 2\]"):
        kernels.kmeans(z, 2, init=z[:3])
    z[1, 1] = torch.nan
    with pytest.raises(ValueError, match=r"z: expected finite features, got NaN at \[1, 1\]"):
        kernels.kmeans(z, 2)
