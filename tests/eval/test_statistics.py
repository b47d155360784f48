"""Intervals and paired tests: coverage on data with a known mean, and the exact test of few differences."""

import itertools
import math

import numpy as np
import pytest

from tokenizers_mm.eval.statistics import interval, paired


def test_intervals_cover_the_mean_and_are_seeded() -> None:
    rng = np.random.default_rng(0)
    hits = 0
    for _ in range(60):
        low, high = interval(rng.normal(3.0, 2.0, 50).tolist())
        hits += low <= 3.0 <= high
    assert 50 <= hits <= 60
    values = rng.normal(size=30).tolist()
    assert interval(values, 1) == interval(values, 1) != interval(values, 2)
    assert interval([*values, math.inf, math.nan], 1) == interval(values, 1)
    assert all(math.isnan(bound) for bound in interval([]))


def test_paired_test_equals_all_signs() -> None:
    a, b = [1.0, 2.0, 4.0, 3.0, 2.5, 1.0, 2.0, 0.4], [0.5, 2.2, 3.0, 1.0, 2.0, 0.9, 1.0, 0.5]
    difference = np.subtract(a, b)
    signs = np.array(list(itertools.product((-1, 1), repeat=len(a))))
    exact = (np.abs(signs @ difference) >= abs(difference.sum()) - 1e-12).mean()
    found = paired(a, b)
    assert found is not None
    assert found["p"] == pytest.approx(exact, abs=0.02)
    assert found["difference"] == pytest.approx(difference.mean())
    assert found["low"] < found["difference"] < found["high"]
    same = paired(a, a)
    assert same is not None
    assert same["p"] == 1.0
    assert paired([math.nan], [1.0]) is None
    shorter = paired([*a, math.inf], [*b, 1.0])
    assert shorter is not None
    assert shorter["images"] == len(a)
