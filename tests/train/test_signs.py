"""Early signs of trouble in made-up series."""

import math
from typing import Any

import pytest

from train.signs import QUIET, SPAN, Signs


def reports(**series: list[float]) -> list[tuple[int, str]]:
    signs, found = Signs(), []
    for step, values in enumerate(zip(*series.values(), strict=True)):
        found += [(step, sentence) for sentence in signs.look(dict(zip(series, values, strict=True)))]
    return found


@pytest.mark.parametrize(
    ("name", "series", "says"),
    [
        ("usage_shared", [0.8] * 20 + [0.8 * 0.85**i for i in range(20)], "usage_shared: fell from 0.8"),
        ("perplexity_pixel", [900.0] * 10 + [90.0] * 20, "perplexity_pixel: fell from 900"),
        ("psnr", [15 + 5 * (1 - math.exp(-i / 5)) for i in range(80)], "psnr: has stopped rising at 20.0 dB"),
        ("psnr", [20.0] * 20 + [16.0] * 10, "psnr: fell by 1.2 dB"),
        ("discriminator", [0.7] * 15 + [0.001] * 20, "discriminator: the discriminator tells everything apart"),
        ("grad_norm", [1.0] * 20 + [500.0] * 10, "grad_norm: rose from 1"),
    ],
)
def test_a_sign_is_reported_once_with_advice(name: str, series: list[float], says: str) -> None:
    found = reports(**{name: series})
    assert len(found) == 1
    assert found[0][1].startswith(says)
    assert "; " in found[0][1]


@pytest.mark.parametrize(
    ("name", "series"),
    [
        ("usage_shared", [min(1.0, 0.1 + i / 50) for i in range(100)]),
        ("psnr", [10 + math.log(1 + i) for i in range(120)]),
        ("discriminator", [0.7 - 0.002 * i for i in range(100)]),
        ("grad_norm", [1.0 + (i % 7) for i in range(100)]),
        ("usage_shared", [0.9] * (2 * SPAN - 2) + [0.0]),  # too short to tell
        ("psnr", [math.nan] * 100),
    ],
)
def test_a_healthy_series_is_silent(name: str, series: list[float]) -> None:
    assert reports(**{name: series}) == []


def test_a_sign_that_stays_is_repeated_after_a_while_and_a_resumed_reader_says_the_same() -> None:
    lines: list[dict[str, Any]] = [{"step": i, "usage_a": 0.9 if i < 20 else 0.01, "note": "x"} for i in range(150)]
    signs = Signs()
    at = [line["step"] for line in lines if signs.look(line)]
    assert len(at) == 3
    assert at[1] - at[0] == at[2] - at[1] == QUIET + 1
    for cut in (30, 90):
        again = Signs(lines[:cut])
        assert [line["step"] for line in lines[cut:] if again.look(line)] == [step for step in at if step >= cut]
