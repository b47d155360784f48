"""Masked diffusion: what is hidden, the loss against a loop in float64, the schedule."""

import math

import pytest
import torch

from tokenizers_mm.functional.masked_diffusion import cosine_ratio, hide, left_hidden, masked_diffusion_loss


def test_hide_takes_the_share_of_what_may_be_hidden() -> None:
    generator = torch.Generator().manual_seed(0)
    maskable = torch.rand(6, 40, generator=generator) < 0.6
    maskable[5] = False
    ratio = torch.tensor([0.0, 0.25, 0.5, 0.75, 1.0, 0.5])
    hidden = hide(maskable, ratio, generator)
    assert not bool((hidden & ~maskable).any())
    wanted = [max(1, round(float(r) * int(n))) for r, n in zip(ratio[:5], maskable.sum(1)[:5], strict=True)]
    assert hidden.sum(1).tolist() == [*wanted, 0]
    counts = torch.stack(
        [hide(torch.ones(1, 4, dtype=torch.bool), torch.tensor([0.5]), generator)[0] for _ in range(2000)]
    )
    # Each place is hidden half of the time: five standard deviations of a binomial share.
    assert float((counts.double().mean(0) - 0.5).abs().max()) < 5 * math.sqrt(0.25 / 2000)


def test_loss_is_the_formula() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(3, 7, 11, generator=generator, requires_grad=True)
    tokens = torch.randint(11, (3, 7), generator=generator)
    maskable = torch.tensor([[1, 1, 1, 1, 0, 0, 0], [1] * 7, [0] * 7]).bool()
    hidden = torch.tensor([[1, 0, 1, 0, 0, 0, 0], [0, 1, 0, 0, 0, 0, 0], [0] * 7]).bool()
    loss = masked_diffusion_loss(logits[hidden], tokens, hidden, maskable)
    log_p = logits.detach().double().log_softmax(-1)
    expected = 0.0
    for row in range(3):
        places = hidden[row].nonzero()[:, 0].tolist()
        if places:
            share = len(places) / int(maskable[row].sum())
            total = -sum(float(log_p[row, i, tokens[row, i]]) for i in places)
            expected += total / share / int(maskable[row].sum()) / 3
    assert float(loss.detach()) == pytest.approx(expected, abs=1e-6)
    loss.backward()
    assert logits.grad is not None
    assert torch.equal(logits.grad.abs().sum(-1) > 0, hidden)


def test_schedule() -> None:
    torch.testing.assert_close(cosine_ratio(torch.tensor([0.0, 0.5, 1.0])), torch.tensor([1.0, math.sqrt(0.5), 0.0]))
    left = [left_hidden(64, step, 8) for step in range(8)]
    assert left == sorted(left, reverse=True)
    assert left[-1] == 0
    assert left[3] == math.floor(64 * math.cos(math.pi / 4))
    assert [left_hidden(2, step, 5) for step in range(5)] == [1, 1, 1, 0, 0]
