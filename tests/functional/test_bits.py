"""Bits, ids and entropies of independent bits against the table of all codes."""

import pytest
import torch
from torch import Tensor

from tokenizers_mm.functional.bits import (
    bit_entropy,
    bits_to_ids,
    flip_bits,
    group_entropies,
    ids_to_bits,
    joint_probabilities,
    signs,
)


def table(bits: int) -> Tensor:
    """All codes in {-1, 1}^bits, [2^bits, bits], float64."""
    return ids_to_bits(torch.arange(1 << bits), bits, "msb_first").double() * 2 - 1


def test_signs() -> None:
    assert signs(torch.tensor([-1.0, -0.0, 0.0, 1e-30])).tolist() == [-1, -1, -1, 1]


@pytest.mark.parametrize("order", ["lsb_first", "msb_first"])
def test_bits_and_ids(order) -> None:
    ids = torch.arange(64).view(4, 16)
    bits = ids_to_bits(ids, 6, order)
    assert torch.equal(bits_to_ids(bits, order), ids)
    one = bits_to_ids(torch.tensor([True, False, False]), order)
    assert int(one) == (1 if order == "lsb_first" else 4)
    top = torch.tensor([(1 << 62) - 1, 1 << 61])
    assert torch.equal(bits_to_ids(ids_to_bits(top, 62, order), order), top)


def test_entropy_of_a_bit_does_not_cancel() -> None:
    odds = torch.tensor([0.0, 1.0, -3.0, 20.0, -40.0], dtype=torch.float64)
    p = torch.sigmoid(odds)
    expected = -(
        p * torch.nn.functional.logsigmoid(odds) + torch.sigmoid(-odds) * torch.nn.functional.logsigmoid(-odds)
    )
    torch.testing.assert_close(bit_entropy(odds.float()), expected.float(), rtol=2e-6, atol=0)
    assert torch.isfinite(bit_entropy(torch.tensor([1e6, -1e6]))).all()


@pytest.mark.parametrize("bits", [1, 2, 5])
@pytest.mark.parametrize("pool", [False, True])
def test_entropies_are_those_of_the_table(bits: int, pool: bool) -> None:
    torch.manual_seed(0)
    x = torch.randn(7, 3, bits, dtype=torch.float64, requires_grad=True)
    log_p = (1.3 * x @ table(bits).T).log_softmax(-1)
    p = log_p.exp()
    torch.testing.assert_close(joint_probabilities(2 * 1.3 * x), p)
    mean = p.mean((0, 1))[None] if pool else p.mean(0)
    expected = -(p * log_p).sum(-1).mean(0), -(mean * (mean + 1e-5).log()).sum(-1)
    found = group_entropies(2 * 1.3 * x, pool=pool)
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs)
        gradients = [torch.autograd.grad(value.sum(), x, retain_graph=True)[0] for value in (ours, theirs)]
        torch.testing.assert_close(*gradients)


def test_many_bits_need_no_table() -> None:
    """18 bits for 512 rows: an N x 2^18 matrix would take 1 GiB."""
    torch.manual_seed(0)
    x = torch.randn(512, 1, 18, requires_grad=True)
    sample, batch = group_entropies(400 * x)
    (sample - batch).sum().backward()
    assert x.grad is not None
    assert x.grad.abs().sum() > 0
    assert float(batch.detach()) <= 18 * 0.6932


def test_flips() -> None:
    ids = torch.tensor([[0, 1, 1, 0]])
    assert flip_bits(ids, torch.tensor([[0.1, 0.2, 0.9, 0.3]]), 0.25).tolist() == [[1, 0, 1, 0]]
    assert torch.equal(flip_bits(ids, torch.zeros(1, 4), 0.0), ids)
