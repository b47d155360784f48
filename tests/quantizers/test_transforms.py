"""Every quantizer under torch.func and inference mode: derivatives straight through, in every mode."""

import inspect

import pytest
import torch
from torch import Tensor
from torch.func import grad, jacrev, jvp, vjp, vmap

from tests.quantizers.kinds import DIM, MAKERS
from tokenizers_mm.quantizers.base import Quantizer

STRAIGHT = {"vq", "simvq"}  # the derivative of the vectors is that of the features, nothing else


@pytest.fixture(params=list(MAKERS))
def case(request: pytest.FixtureRequest) -> tuple[str, Quantizer, Tensor]:
    torch.manual_seed(0)
    return request.param, MAKERS[request.param](), torch.randn(3, 2, 2, DIM)


def test_every_quantizer_is_walked() -> None:
    def below(kind: type) -> set[type]:
        return set(kind.__subclasses__()).union(*map(below, kind.__subclasses__()))

    ours = {kind for kind in below(Quantizer) if kind.__module__.startswith("tokenizers_mm.")}
    assert {kind for kind in ours if not inspect.isabstract(kind)} == {type(make()) for make in MAKERS.values()}


def loss(quantizer: Quantizer, z: Tensor) -> Tensor:
    """Vectors and all terms, so that every path of a derivative counts."""
    found = quantizer.quantize(z)
    total = (found.vectors * torch.linspace(-1, 1, found.vectors.numel()).view_as(found.vectors)).sum()
    if found.terms is not None:
        total = total + sum(found.terms.values())
    return total


@pytest.mark.filterwarnings("ignore:.*torch.jit.script:FutureWarning")  # torch's own, when jvp is first used
@pytest.mark.parametrize("training", [False, True])
def test_derivatives_agree_in_every_mode(case: tuple[str, Quantizer, Tensor], training: bool) -> None:
    name, quantizer, z = case
    quantizer.train(training)
    direction = torch.randn_like(z)

    def of(x: Tensor) -> Tensor:
        return loss(quantizer, x)

    leaf = z.clone().requires_grad_()
    (expected,) = torch.autograd.grad(of(leaf), leaf)
    assert expected.abs().sum() > 0
    value, tangent = jvp(of, (z,), (direction,))[:2]
    torch.testing.assert_close(value, of(z))
    torch.testing.assert_close(tangent, (expected * direction).sum(), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(grad(of)(z), expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(vjp(of, z)[1](torch.ones(()))[0], expected, rtol=1e-5, atol=1e-6)
    with torch.autograd.forward_ad.dual_level():
        dual = of(torch.autograd.forward_ad.make_dual(z, direction))
        torch.testing.assert_close(torch.autograd.forward_ad.unpack_dual(dual).tangent, tangent)
    if name in STRAIGHT and not training:
        out, tangents = jvp(lambda x: quantizer.quantize(x).vectors, (z,), (direction,))[:2]
        torch.testing.assert_close(out, quantizer.look_up(quantizer.quantize(z).ids))
        torch.testing.assert_close(tangents, direction)


@pytest.mark.filterwarnings("ignore:There is a performance drop:UserWarning")  # torch's pooling has no batching rule
def test_vmap_is_a_loop(case: tuple[str, Quantizer, Tensor]) -> None:
    _, quantizer, z = case
    quantizer.eval()
    found = vmap(lambda x: quantizer.quantize(x[None]).vectors[0])(z)
    torch.testing.assert_close(found, torch.cat([quantizer.quantize(x[None]).vectors for x in z]))
    gradients = vmap(grad(lambda x: loss(quantizer, x[None])))(z)
    expected = torch.stack([grad(lambda y: loss(quantizer, y[None]))(x) for x in z])
    torch.testing.assert_close(gradients, expected, rtol=1e-5, atol=1e-6)
    assert jacrev(lambda x: quantizer.quantize(x).vectors)(z[:1]).shape == (1, 2, 2, DIM, 1, 2, 2, DIM)


def test_ids_of_inference_mode_train_what_reads_them(case: tuple[str, Quantizer, Tensor]) -> None:
    _, quantizer, z = case
    with torch.inference_mode():
        ids = quantizer.eval().quantize(z).ids
    quantizer.train()
    weight = torch.ones(DIM, requires_grad=True)
    (quantizer.look_up(ids) * weight).sum().backward()
    assert weight.grad is not None
    expected = quantizer.look_up(ids.clone()).detach().flatten(0, -2).sum(0)
    torch.testing.assert_close(weight.grad, expected)
