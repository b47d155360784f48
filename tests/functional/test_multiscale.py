"""Going down and up between scales, against formulas."""

import numpy as np
import torch
import torch.nn.functional as F

from tokenizers_mm.functional.multiscale import area_down, bicubic_up, nearest_tick, upsample
from tokenizers_mm.functional.usage import count_ids, perplexity, usage


def test_area_is_the_mean_of_cells_and_both_keep_constants() -> None:
    x = torch.randn(2, 4, 6, 3)
    down = area_down(x, (2, 3))
    torch.testing.assert_close(down[:, 1, 2], x[:, 2:4, 4:6].mean((1, 2)))
    assert area_down(x, (4, 6)) is x
    assert bicubic_up(x, (4, 6)) is x
    ones = torch.ones(1, 3, 3, 2)
    torch.testing.assert_close(bicubic_up(ones, (7, 5)), torch.ones(1, 7, 5, 2))


def test_bicubic_is_the_kernel_with_a_of_three_quarters() -> None:
    """Keys (1981): four taps around each point, a = -0.75, coordinates at pixel centres."""
    rows = torch.randn(8, dtype=torch.float64)
    up = bicubic_up(rows.view(1, 8, 1, 1).expand(1, 8, 8, 1), (16, 16))[0, :, 0, 0]

    def tap(t: float, a: float = -0.75) -> float:
        t = abs(t)
        if t <= 1:
            return (a + 2) * t**3 - (a + 3) * t**2 + 1
        return a * t**3 - 5 * a * t**2 + 8 * a * t - 4 * a if t < 2 else 0.0

    for index in range(5, 11):
        place = (index + 0.5) / 2 - 0.5
        expected = sum(float(rows[k]) * tap(place - k) for k in range(8))
        assert abs(float(up[index]) - expected) < 1e-12


def test_counts() -> None:
    counts = count_ids(torch.tensor([[0, 3], [3, 3]]), 5)
    assert counts.tolist() == [1, 0, 0, 3, 0]
    assert usage(counts) == 2 / 5
    assert abs(perplexity(torch.ones(8, dtype=torch.int64)) - 8) < 1e-9
    assert perplexity(torch.zeros(8, dtype=torch.int64)) == 0


def test_ticks_are_those_of_var() -> None:
    """argmin over numpy's linspace, as the original code has it, for 10 scales and every number of blocks."""
    for count in range(1, 11):
        part = 3 if count == 4 else 2
        ticks = np.linspace(1 / part / count, 1 - 1 / part / count, count)
        for scale in range(10):
            assert nearest_tick(scale / 9, count) == int(np.argmin(np.abs(ticks - scale / 9)))


def test_bilinear_is_trilinear_over_one_frame() -> None:
    x = torch.randn(2, 3, 4, 5)
    expected = F.interpolate(x.permute(0, 3, 1, 2)[:, :, None], size=(1, 6, 7), mode="trilinear")[:, :, 0]
    torch.testing.assert_close(upsample(x, (6, 7), "bilinear"), expected.permute(0, 2, 3, 1))
