"""Drawing from logits: against plain formulas, and the frequencies of what is drawn."""

import pytest
import torch

from tokenizers_mm.functional.sampling import draw, filter_logits, guide_logits, sample_logits


def test_guidance_is_the_formula_in_float64() -> None:
    generator = torch.Generator().manual_seed(0)
    c, u = (torch.randn(3, 50, generator=generator) for _ in range(2))
    log_c, log_u = c.double().log_softmax(-1), u.double().log_softmax(-1)
    for scale in (0.0, 1.0, 2.5):
        expected = scale * (log_c - log_u) + log_u
        torch.testing.assert_close(guide_logits(c, u, scale).double(), expected, atol=1e-5, rtol=0)
    raw = (1 + 1.5) * c - 1.5 * u  # the form without logarithms: the same distribution
    torch.testing.assert_close(guide_logits(c, u, 2.5).softmax(-1), raw.softmax(-1), atol=1e-6, rtol=0)


def test_filters() -> None:
    logits = torch.tensor([[0.0, 3.0, 1.0, 2.0]])
    values, index = filter_logits(logits, 2.0, 2)
    assert index is not None
    assert index.tolist() == [[1, 3]]
    assert values.tolist() == [[1.5, 1.0]]
    values, index = filter_logits(logits, 1.0, 0, 1e-9)
    assert index is not None
    assert index[torch.isfinite(values)].tolist() == [1]
    values, index = filter_logits(logits, 0.0)
    assert index is not None
    assert index.tolist() == [[1]]
    values, index = filter_logits(logits)
    assert index is None
    assert torch.equal(values, logits)


@pytest.mark.parametrize("size", [1, 3, 256, 1000])
def test_draw_follows_the_probabilities(size: int) -> None:
    """Chi-square of 20,000 draws; its mean is the degrees of freedom, and 5 standard deviations are allowed."""
    generator = torch.Generator().manual_seed(size)
    p = torch.rand(size, generator=generator) * (torch.rand(size, generator=generator) > 0.3)
    p[0] += 0.1
    p = p / p.sum()
    drawn = draw(p.expand(20000, -1), generator)
    counts = torch.bincount(drawn, minlength=size).double()
    assert float(counts[p == 0].sum()) == 0
    some, expected = counts[p > 0], 20000 * p[p > 0].double()
    freedom = max(len(expected) - 1, 1)
    assert float(((some - expected) ** 2 / expected).sum()) < freedom + 5 * (2 * freedom) ** 0.5


def test_draw_takes_what_alone_is_possible() -> None:
    p = torch.zeros(6, 700)
    places = torch.tensor([0, 255, 256, 511, 512, 699])
    p[torch.arange(6), places] = 1.0
    for seed in range(20):
        assert torch.equal(draw(p, torch.Generator().manual_seed(seed)), places)
    logits = p.log()
    assert torch.equal(sample_logits(logits, 2.0, top_k=5, top_p=0.9), places)
