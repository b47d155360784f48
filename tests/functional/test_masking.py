"""Orders, masks and their schedule: the original's numbers, and what must hold for any size."""

import math
from itertools import pairwise

import numpy as np
import pytest
import torch

from tests.cases import case
from tokenizers_mm.functional.gradients import scale_gradient
from tokenizers_mm.functional.masking import (
    mask_first,
    masked_counts,
    masked_mean,
    positions_where,
    put,
    random_mask,
    random_orders,
    take,
    truncated_normal_ratio,
)


@pytest.mark.parametrize(("length", "steps"), [(1024, 64), (16, 8), (256, 64), (48, 8)])
def test_counts_of_the_original(length: int, steps: int) -> None:
    expected = case("mar/diffusion_schedules").outputs[f"mask_len_L{length}_K{steps}"].tolist()
    counts = masked_counts(length, steps)
    assert counts[:-1] == expected[:-1]
    assert (counts[-1], expected[-1]) == (0, 1)  # the original reveals the last one regardless


@pytest.mark.parametrize(("length", "steps"), [(1, 1), (7, 7), (64, 1), (64, 63), (100, 100), (1024, 64)])
def test_every_step_reveals_something(length: int, steps: int) -> None:
    counts = [length, *masked_counts(length, steps)]
    assert len(counts) == steps + 1
    assert counts[-1] == 0
    assert all(a > b for a, b in pairwise(counts))


def test_too_many_steps() -> None:
    with pytest.raises(ValueError, match="num_steps: expected 1 to 4"):
        masked_counts(4, 5)


def test_orders_are_permutations_and_repeatable() -> None:
    orders = random_orders(5, 30, torch.Generator().manual_seed(3))
    assert torch.equal(orders.sort(1).values, torch.arange(30).expand(5, 30))
    assert torch.equal(orders, random_orders(5, 30, torch.Generator().manual_seed(3)))
    assert len({tuple(row) for row in orders.tolist()}) == 5


def test_ratio_is_a_truncated_normal() -> None:
    """Mean of N(1, 0.25) on [0.7, 1] is 1 - 0.25 (phi(0) - phi(-1.2)) / (Phi(0) - Phi(-1.2)) = 0.8664."""
    generator = torch.Generator().manual_seed(0)
    draws = np.array([truncated_normal_ratio(generator) for _ in range(3000)])
    assert draws.min() >= 0.7
    assert draws.max() <= 1.0
    density = (1 - math.exp(-0.72)) / math.sqrt(2 * math.pi)
    expected = 1 - 0.25 * density / (0.5 * math.erf(1.2 / math.sqrt(2)))
    assert draws.mean() == pytest.approx(expected, abs=0.006)  # 4 standard errors
    below = (draws < 0.85).mean()
    share = (math.erf(1.2 / math.sqrt(2)) - math.erf(0.6 / math.sqrt(2))) / math.erf(1.2 / math.sqrt(2))
    assert below == pytest.approx(share, abs=0.036)


def test_masks_and_positions() -> None:
    mask = random_mask(6, 50, torch.Generator().manual_seed(1))
    counts = mask.sum(1)
    assert 35 <= int(counts[0]) <= 50
    assert bool((counts == counts[0]).all())
    visible = positions_where(~mask)
    assert bool((visible.diff(dim=1) > 0).all())
    x = torch.randn(6, 50, 3)
    again = put(torch.zeros(6, 50, 3), visible, take(x, visible))
    assert torch.equal(again, x * ~mask[..., None])
    order = torch.tensor([[2, 0, 1]])
    assert mask_first(order, 2).tolist() == [[True, False, True]]
    assert mask_first(order[:, :2], 1, 4).tolist() == [[False, False, True, False]]
    assert float(masked_mean(torch.tensor([1.0, 5.0, 3.0]), torch.tensor([True, False, True]))) == 2.0


def test_unequal_masks_are_refused() -> None:
    with pytest.raises(ValueError, match=r"same number of masked tokens in every sample, got \[1, 2\]"):
        positions_where(torch.tensor([[True, False], [True, True]]))


def test_scaled_gradient() -> None:
    x = torch.randn(4, requires_grad=True)
    y = scale_gradient(x, 0.1)
    torch.testing.assert_close(y, x)
    y.sum().backward()
    torch.testing.assert_close(x.grad, torch.full((4,), 0.1))
