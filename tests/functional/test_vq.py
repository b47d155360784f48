"""Vector-quantization terms: which tensor each gradient reaches, values in 64 bits, and the entropy without N x K."""

import math

import torch

from tokenizers_mm.functional import assignment, vq


def test_each_term_reaches_its_own_tensor() -> None:
    z = torch.randn(5, 3, requires_grad=True)
    e = torch.randn(5, 3, requires_grad=True)
    terms = vq.vq_terms(z, e)
    assert torch.autograd.grad(terms["codebook"], (z, e), allow_unused=True, retain_graph=True)[0] is None
    assert torch.autograd.grad(terms["commitment"], (z, e), allow_unused=True)[1] is None
    torch.testing.assert_close(terms["codebook"], ((e - z) ** 2).mean())
    st = vq.straight_through(z, e)
    torch.testing.assert_close(st, e)
    to_z, to_e = torch.autograd.grad((st * torch.arange(3.0)).sum(), (z, e), allow_unused=True)
    torch.testing.assert_close(to_z, torch.arange(3.0).expand(5, 3))
    assert to_e is None


def test_rotation_keeps_the_value_and_turns_the_gradient() -> None:
    torch.manual_seed(0)
    z = torch.randn(7, 4, dtype=torch.float64, requires_grad=True)
    e = torch.randn(7, 4, dtype=torch.float64)
    rotated = vq.rotate_to(z, e)
    torch.testing.assert_close(rotated, e)
    # along its own direction the gradient of |rotated| is |e| / |z|; orthogonal moves stay orthogonal
    (grad,) = torch.autograd.grad(rotated.norm(dim=1).sum(), z)
    expected = z / z.norm(dim=1, keepdim=True) * (e.norm(dim=1) / z.norm(dim=1))[:, None]
    torch.testing.assert_close(grad, expected.detach())


def test_entropy_equals_the_full_matrix_and_its_gradients(monkeypatch) -> None:
    torch.manual_seed(0)
    z = torch.randn(37, 4, dtype=torch.float64, requires_grad=True)
    codebook = torch.randn(11, 4, dtype=torch.float64, requires_grad=True)
    monkeypatch.setattr(assignment, "TILE", 11 * 5)  # several tiles
    value = vq.codebook_entropy(z, codebook, temperature=0.7)
    p = torch.softmax(-(z[:, None] - codebook).square().sum(-1) / 0.7, -1)
    mean = p.mean(0)
    expected = -(p * p.log()).sum(1).mean() + (mean * (mean + 1e-5).log()).sum()
    torch.testing.assert_close(value, expected)
    for ours, theirs in zip(*(torch.autograd.grad(v, (z, codebook)) for v in (value, expected)), strict=True):
        torch.testing.assert_close(ours, theirs)
    assert -math.log(11) <= float(value.detach()) <= 0
