"""Steps at the edges of patches: small ones go, large ones and slopes stay."""

import pytest
import torch

from tokenizers_mm.functional.deblocking import deblock


def steps(height: float) -> torch.Tensor:
    """Two flat patches side by side, twice below each other."""
    x = torch.zeros(1, 3, 16, 16)
    x[..., 8:] = height
    return x


def test_a_small_step_becomes_a_ramp() -> None:
    y = deblock(steps(0.02), 8, 0.2)
    assert float((y[..., 8] - y[..., 7]).abs().max()) < 0.001
    assert float((y[..., 1:] - y[..., :-1]).max()) < 0.011
    torch.testing.assert_close(y.mean(), steps(0.02).mean())
    assert torch.equal(y[..., :5], steps(0.02)[..., :5])


def test_a_large_step_and_a_slope_stay() -> None:
    torch.testing.assert_close(deblock(steps(1.0), 8, 0.2), steps(1.0))
    slope = torch.arange(16.0).expand(1, 3, 16, 16) / 16
    torch.testing.assert_close(deblock(slope, 8, 0.2), slope)


def test_rows_and_columns_are_alike() -> None:
    x = torch.rand(2, 3, 16, 24, generator=torch.Generator().manual_seed(0)) * 0.1
    torch.testing.assert_close(
        deblock(steps(0.02).transpose(-1, -2), 8, 0.2).transpose(-1, -2), deblock(steps(0.02), 8, 0.2)
    )
    assert deblock(x, 8, 0.2).shape == x.shape


def test_gradients_are_those_of_the_formula() -> None:
    x = torch.rand(1, 2, 6, 12, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 0.2
    assert torch.autograd.gradcheck(lambda v: deblock(v, 6, 0.3), (x.requires_grad_(),))


@pytest.mark.parametrize("patch", [6, 8])
def test_every_inner_edge_is_seen(patch: int) -> None:
    x = torch.zeros(1, 1, 2 * patch, 3 * patch)
    x[..., patch : 2 * patch] = 0.02
    y = deblock(x, patch, 0.5)
    for edge in (patch, 2 * patch):
        assert float((y[..., edge] - y[..., edge - 1]).abs().max()) < 1e-3
