"""Index backpropagation and entropies against the N x K form: values, gradients, exact ids, memory."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tokenizers_mm.functional import assignment
from tokenizers_mm.functional.assignment import assign, assignment_entropies, largest_logit


def naive(z: Tensor, keys: Tensor, values: Tensor, scale: float, entropy_scale: float, eps: float = 1e-5):
    """The definition with one-hot vectors, as the original code has it."""
    logits = z @ keys.T
    p = (scale * logits).softmax(-1)
    ids = logits.argmax(-1)
    hard = F.one_hot(ids, len(keys)).to(z.dtype)
    log_q = (entropy_scale * logits).log_softmax(-1)
    mean = log_q.exp().mean(0)
    entropies = -(log_q.exp() * log_q).sum(-1).mean(), -(mean * (mean + eps).log()).sum()
    return (hard - p.detach() + p) @ values, hard @ values, ids, *entropies


def objective(outputs, weight: Tensor) -> Tensor:
    """All differentiable outputs, each with a weight of its own."""
    propagated, rows, _, sample, batch = outputs
    return (propagated * weight).sum() + (rows * weight.flip(0)).sum() * 0.3 + 1.7 * sample - 0.6 * batch


@pytest.mark.parametrize("own_values", [False, True])
@pytest.mark.parametrize("tile", [1 << 22, 100])
def test_values_and_gradients_of_the_matrix_form(own_values: bool, tile: int, monkeypatch) -> None:
    monkeypatch.setattr(assignment, "TILE", tile)
    torch.manual_seed(0)
    z = torch.randn(23, 6, dtype=torch.float64, requires_grad=True)
    keys = torch.randn(31, 6, dtype=torch.float64, requires_grad=True)
    values = torch.randn(31, 4, dtype=torch.float64, requires_grad=True) if own_values else None
    inputs = (z, keys) if values is None else (z, keys, values)
    weight = torch.randn(23, 4 if own_values else 6, dtype=torch.float64)
    ours = assign(z, keys, values, scale=0.7, entropy_scale=2.5)
    theirs = naive(z, keys, keys if values is None else values, 0.7, 2.5)
    assert torch.equal(ours.ids, theirs[2])
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-12, atol=1e-12)
    gradients = [torch.autograd.grad(objective(outputs, weight), inputs) for outputs in (ours, theirs)]
    for mine, other in zip(*gradients, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-12, atol=1e-13)


def test_single_precision_gradients() -> None:
    torch.manual_seed(0)
    z, keys, weight = torch.randn(64, 16), torch.randn(256, 16) * 0.3, torch.randn(64, 16)
    found = []
    for dtype, form in ((torch.float32, assign), (torch.float64, naive)):
        inputs = [t.to(dtype).requires_grad_() for t in (z, keys)]
        z_of, keys_of = inputs
        if form is naive:
            outputs = naive(z_of, keys_of, keys_of, 1.0, 10.0)
        else:
            outputs = assign(z_of, keys_of, entropy_scale=10.0)
        found.append(torch.autograd.grad(objective(outputs, weight.to(dtype)), inputs))
    for ours, exact in zip(*found, strict=True):
        assert (ours - exact).norm() / exact.norm() < 1e-5


def test_gradient_of_the_entropies_with_a_bias(monkeypatch) -> None:
    monkeypatch.setattr(assignment, "TILE", 100)
    torch.manual_seed(0)
    z, keys = torch.randn(13, 3, dtype=torch.float64), torch.randn(17, 3, dtype=torch.float64)
    bias = torch.randn(17, dtype=torch.float64)
    inputs = [t.requires_grad_() for t in (z, keys, bias)]
    assert torch.autograd.gradcheck(lambda *x: assignment_entropies(*x, scale=1.5), inputs)


def test_ids_are_those_of_float64_and_ties_go_to_the_lowest() -> None:
    torch.manual_seed(0)
    keys = torch.randn(300, 8)
    keys[200:] = keys[:100]  # every one of these ties
    keys[150] = keys[149] * (1 + 2e-7)  # apart by less than float32's rounding of a product
    z = torch.cat([torch.randn(500, 8), keys[149:151] * 10, torch.zeros(1, 8)])
    logits = (z.double()[:, None] * keys.double()).sum(-1)
    best = logits.max(1, keepdim=True).values
    expected = (logits == best).int().argmax(1)
    assert torch.equal(largest_logit(z, keys), expected)
    assert torch.equal(assign(z, keys).ids, expected)
    assert torch.equal(torch.cat([largest_logit(row[None], keys) for row in z]), expected)
    assert torch.equal(torch.func.vmap(lambda row: largest_logit(row[None], keys)[0])(z), expected)
    bias = torch.randn(300)
    assert torch.equal(largest_logit(z, keys, bias), (logits + bias.double()).max(1, keepdim=True)[1][:, 0])


def test_empty_batch() -> None:
    keys = torch.randn(5, 3, requires_grad=True)
    found = assign(torch.zeros(0, 3, requires_grad=True), keys, entropy_scale=1.0)
    assert found.propagated.shape == (0, 3)
    (found.propagated.sum() + found.sample_entropy).backward()
    assert keys.grad is not None
    assert not keys.grad.any()


def test_second_derivatives_are_refused() -> None:
    z, keys = torch.randn(3, 2, requires_grad=True), torch.randn(5, 2, requires_grad=True)
    (first,) = torch.autograd.grad(assign(z, keys).propagated.sum(), z, create_graph=True)
    with pytest.raises(RuntimeError):
        torch.autograd.grad(first.sum(), z)


@pytest.mark.parametrize("precision", ["high", "medium"])
def test_ids_do_not_depend_on_the_precision_of_products(precision: str) -> None:
    torch.manual_seed(0)
    z, keys = torch.randn(200, 64), torch.randn(400, 64)
    expected = (z.double() @ keys.double().T).argmax(1)
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        assert torch.equal(largest_logit(z, keys), expected)
    finally:
        torch.set_float32_matmul_precision(before)
