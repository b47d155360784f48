"""Scalar levels: bounds in 64 bits, iFSQ's and CubiD's forms, ties and ends of the range."""

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from tokenizers_mm.functional.scalar import (
    Bound,
    ids_to_levels,
    level_values,
    levels_to_ids,
    nearest_level,
    normal_levels,
    round_to_levels,
    uniform_levels,
)

LEVELS = (8, 5, 2, 3)


@pytest.mark.parametrize("bound", ["tanh", "symmetric", "sigmoid"])
def test_all_levels_are_reached_and_no_other(bound: Bound) -> None:
    z = torch.linspace(-30, 30, 6001, dtype=torch.float64)[:, None].expand(-1, 4)
    whole = round_to_levels(z, LEVELS, bound)
    values = level_values(whole, LEVELS, bound)
    for channel, count in enumerate(LEVELS):
        found = whole[:, channel].round().unique().tolist()
        assert found == list(range(-(count // 2), (count + 1) // 2))
        assert bool((whole[:, channel].diff() >= -1e-12).all())
    assert float(values.min()) == -1
    if bound == "symmetric":
        torch.testing.assert_close(values.max(0).values, torch.ones(4, dtype=torch.float64))
    ids = levels_to_ids(whole, LEVELS)
    torch.testing.assert_close(ids_to_levels(ids, LEVELS).double(), whole, rtol=0, atol=1e-9)
    assert int(ids.max()) == math.prod(LEVELS) - 1


def test_gradients_are_those_of_the_bounds() -> None:
    z = torch.randn(50, 2, dtype=torch.float64, requires_grad=True)
    slopes: dict[Bound, Callable[[Tensor], Tensor]] = {
        "symmetric": lambda x: (1 - x.tanh() ** 2) / 2,
        "sigmoid": lambda x: 1.6 * torch.sigmoid(1.6 * x) * torch.sigmoid(-1.6 * x),
    }
    for bound, slope in slopes.items():
        (found,) = torch.autograd.grad(round_to_levels(z, (5, 4), bound).sum(), z)
        torch.testing.assert_close(found, (slope(z) * torch.tensor([4, 3])).detach())


def test_ifsq_is_its_line() -> None:
    """round((2 sigmoid(1.6 z) - 1) (L - 1) / 2) / (L // 2) for odd L."""
    z = torch.randn(200, 2)
    expected = ((2 * torch.sigmoid(1.6 * z) - 1) * torch.tensor([4.0, 8.0])).round() / torch.tensor([4, 8])
    torch.testing.assert_close(level_values(round_to_levels(z, (9, 17), "sigmoid"), (9, 17)), expected)
    counts = {}
    bounds: tuple[Bound, ...] = ("sigmoid", "tanh")
    for bound in bounds:
        whole = round_to_levels(torch.randn(20000, 1), (9,), bound)
        counts[bound] = whole.unique(return_counts=True)[1][1:-1].float()  # inside: the outermost bins are half as wide
    assert counts["sigmoid"].std() < counts["tanh"].std() / 2  # near uniform for normal features


def test_normal_levels_are_means_of_their_bins() -> None:
    """Against numerical integration over bins of equal probability, cut at 3 standard deviations."""
    count, low, high = 8, -9.0, 9.0
    found = (normal_levels(count, low, high) - (low + high) / 2) / ((high - low) / 6)
    x = torch.linspace(-3, 3, 2_000_001, dtype=torch.float64)
    density = torch.exp(-x.square() / 2)
    bins = ((1 + torch.erf(x / math.sqrt(2))) / 2 * count).floor().long().clamp(0, count - 1)
    total = torch.zeros(count, dtype=torch.float64).index_add(0, bins, density)
    expected = torch.zeros(count, dtype=torch.float64).index_add(0, bins, density * x) / total
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found, -found.flip(0))


def test_nearest_level_is_the_argmin() -> None:
    values = normal_levels(8, -2.0, 1.0)
    x = torch.cat([torch.randn(500, dtype=torch.float64) * 2, values, (values[1:] + values[:-1]) / 2])
    expected = (x[:, None] - values).abs()
    found = nearest_level(x, values)
    torch.testing.assert_close(expected.gather(1, found[:, None])[:, 0], expected.min(1).values)
    assert found[-7:].tolist() == list(range(7))  # half-way: the lower one
    assert uniform_levels(4, 0.0, 1.0).tolist() == [0.125, 0.375, 0.625, 0.875]
