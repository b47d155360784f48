"""Muon in float32: singular values near one, and the steps of torch's own optimizer."""

import pytest
import torch
from torch import nn

from train.demo.muon import Muon, orthogonal


@pytest.mark.parametrize("shape", [(8, 8), (6, 20), (20, 6)])
def test_singular_values_are_near_one(shape: tuple[int, int]) -> None:
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    values = torch.linalg.svdvals(orthogonal(matrix[None])[0])
    assert float(values.min()) > 0.5
    assert float(values.max()) < 1.3
    left, _, right = torch.linalg.svd(matrix, full_matrices=False)
    assert float((orthogonal(matrix[None])[0] * (left @ right)).sum()) / min(shape) > 0.7  # towards the polar factor


def test_its_steps_are_those_of_torch() -> None:
    """torch rounds to bfloat16 on the way, hence the tolerance."""
    generator = torch.Generator().manual_seed(0)
    ours, theirs = (nn.Parameter(torch.ones(12, 5)) for _ in range(2))
    one, two = Muon([ours], 0.1, 0.01), torch.optim.Muon([theirs], lr=0.1, weight_decay=0.01)
    for _ in range(4):
        ours.grad = torch.randn(12, 5, generator=generator)
        theirs.grad = ours.grad.clone()
        one.step()
        two.step()
    assert float((ours - theirs).detach().abs().max()) < 0.03
    assert float((ours - 1).detach().abs().max()) > 0.1
