"""LPIPS as DualViTok's training uses it, in evaluation mode, against the original: values, layers, gradient."""

import json
import re

import pytest
import torch
from torch import Tensor

from tests.cases import case
from tests.dualvitok_weights import by_rule

pytest.importorskip("lpips", reason="the perceptual term needs the lpips package")
from tokenizers_mm.losses.perceptual import LPIPS

DEPTH = 5  # feature maps that are compared


@pytest.fixture(scope="module")
def perceptual() -> LPIPS:
    """With the case's weights: by rule on the original's names, the linear ones positive."""
    description = json.loads((case("dualvitok/lpips_vgg").folder / "lpips.json").read_text())
    theirs = {
        name: by_rule(name, shape, description["seed"], description["gains"])
        for name, shape in description["keys"].items()
        if not name.startswith("scaling_layer")
    }
    model = LPIPS()
    state: dict[str, Tensor] = {}
    for name, tensor in model.net.state_dict().items():
        original = re.sub(r"^lins\.(\d)\.", r"lin\1.", name)
        if original in theirs:
            state[name] = theirs[original].abs() if original.startswith("lin") else theirs[original]
        else:
            assert name.startswith("scaling_layer"), name
            state[name] = tensor
    model.net.load_state_dict(state)
    return model


@pytest.mark.parametrize("index", [0, 1])
def test_values_layers_and_gradient(perceptual: LPIPS, index: int) -> None:
    t = case("dualvitok/lpips_vgg", whole=True).tensors("lpips")
    if f"{index}.a" not in t:
        pytest.skip("this pair is not among what this checkout carries")
    a, b = t[f"{index}.a"], t[f"{index}.b"].requires_grad_()
    perceptual.train()  # stays in evaluation mode: the original's dropout acts in training
    distance = perceptual(a, b)
    torch.testing.assert_close(distance, t[f"{index}.lpips"].flatten(), rtol=1e-4, atol=1e-6)
    (gradient,) = torch.autograd.grad(distance.sum(), b)
    expected = t[f"{index}.grad_b"]
    torch.testing.assert_close(gradient, expected, rtol=0, atol=1e-4 * float(expected.abs().max()))
    _, layers = perceptual.net(a, b, retPerLayer=True)
    for layer in range(DEPTH):
        value = layers[layer].mean((1, 2, 3)) if layers[layer].ndim == 4 else layers[layer]
        torch.testing.assert_close(value.flatten(), t[f"{index}.layer{layer}"].flatten(), rtol=1e-4, atol=1e-6)
