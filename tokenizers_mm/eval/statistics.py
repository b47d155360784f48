"""Confidence intervals and paired significance of per-image values, seeded."""

from collections.abc import Sequence
from typing import Any

import numpy as np

RESAMPLES = 2000
CHUNK = 1 << 22
"""Random numbers drawn at once."""


def interval(values: Sequence[float], seed: int = 0, level: float = 0.95) -> tuple[float, float]:
    """Percentile bootstrap interval of the mean of the finite values; (nan, nan) for none."""
    data = np.asarray(values, dtype=np.float64)
    data = data[np.isfinite(data)]
    if not len(data):
        return float("nan"), float("nan")
    rng, means = np.random.default_rng(seed), []
    for count in _chunks(len(data)):
        means.append(data[rng.integers(0, len(data), (count, len(data)))].mean(1))
    low, high = np.quantile(np.concatenate(means), [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def paired(a: Sequence[float], b: Sequence[float], seed: int = 0) -> dict[str, Any] | None:
    """The mean of a - b over images where both are finite, its interval, and the p-value of a sign-flip test.

    The test is two-sided: the share of random signs of the differences whose mean is at least as far from zero; the
    observed one counts as one of them. None where no image has both values.
    """
    first, second = (np.asarray(values, dtype=np.float64) for values in (a, b))
    both = np.isfinite(first) & np.isfinite(second)
    difference = first[both] - second[both]
    if not len(difference):
        return None
    rng, extreme, mean = np.random.default_rng(seed), 0, abs(difference.mean())
    for count in _chunks(len(difference)):
        signs = rng.integers(0, 2, (count, len(difference)), dtype=np.int8) * 2.0 - 1
        extreme += int((np.abs(signs @ difference) / len(difference) >= mean * (1 - 1e-12)).sum())
    low, high = interval(difference.tolist(), seed)
    return {
        "difference": float(difference.mean()),
        "low": low,
        "high": high,
        "p": (extreme + 1) / (RESAMPLES + 1),
        "images": len(difference),
    }


def _chunks(length: int) -> list[int]:
    """Numbers of resamples that are drawn together."""
    most = max(1, CHUNK // length)
    return [min(most, RESAMPLES - start) for start in range(0, RESAMPLES, most)]
