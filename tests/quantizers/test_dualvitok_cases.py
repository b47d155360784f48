"""SimVQ against DualViTok's original code: values, ids, loss, and which gradient reaches what."""

import json

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from tests.cases import case
from tests.dualvitok_weights import by_rule
from tokenizers_mm.quantizers.vq import SimVQ, SimVQConfig

NAMES = ["st", "rot", "frozendim", "chlast_w", "blocks", "dim32_32k", "dim32_98k"]
GAP = 1e-4  # ids must be equal where the original's margin exceeds this (its README); it is larger everywhere here


def build(description: dict) -> SimVQ:
    options = description["kw"]
    config = SimVQConfig(
        options["codebook_size"], options["dim"], options.get("frozen_codebook_dim"), options["rotation_trick"]
    )
    quantizer = SimVQ(config).train()
    names = {"frozen": "frozen_codebook", "transform.weight": "code_transform.weight"}
    shapes = description["weight_keys"]
    state = {ours: by_rule(f"q.{name}", shapes[name], description["seed"], {}) for ours, name in names.items()}
    quantizer.load_state_dict(state)
    return quantizer


def close(actual: Tensor, expected: Tensor, name: str) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-3, atol=1e-6, msg=lambda m: f"{name}: {m}")


@pytest.mark.parametrize("name", NAMES)
def test_simvq(name: str) -> None:
    own = case("dualvitok/quantizer", whole=True)
    description = json.loads((own.folder / "cases.json").read_text())[name]
    path = own.folder / f"{name}.safetensors"
    if not path.is_file():
        pytest.skip(f"{name} is not among what this checkout carries")
    t, options, quantizer = load_file(path), description["kw"], build(description)
    first = options["channel_first"]

    def last(x: Tensor) -> Tensor:
        return x.movedim(1, -1) if first else x

    def loss_of(terms) -> Tensor:
        # The original weights the whole by commitment_weight and the encoder's term by another factor.
        weight = options.get("commitment_weight", 1.0)
        return weight * (terms.codebook + options.get("input_to_quantize_commit_loss_weight", 0.25) * terms.commitment)

    z = t["z"].requires_grad_()
    result = quantizer.quantize(last(z))
    sure = t["gap"].reshape(result.ids.shape) > GAP
    assert sure.float().mean() > 0.98
    assert torch.equal(result.ids[sure], t["indices"][sure])
    assert torch.equal(result.ids.flatten(), t["argmin_float64"])
    torch.testing.assert_close(result.vectors, last(t["quantized"]), atol=2e-6, rtol=0)
    torch.testing.assert_close(quantizer.look_up(result.ids), last(t["indices_to_codes"]), atol=1e-6, rtol=0)
    assert result.terms is not None
    loss = loss_of(result.terms)
    torch.testing.assert_close(loss, t["loss"], rtol=1e-5, atol=0)
    total = (result.vectors * last(t["g"])).sum() + loss
    weight = quantizer.transform.weight
    for objective, suffix in ((loss, "_loss_only"), (total, "")):
        to_z, to_weight = torch.autograd.grad(objective, (z, weight), retain_graph=True)
        close(to_z, t[f"grad_z{suffix}"], f"grad_z{suffix}")
        close(to_weight, t[f"grad{suffix}.code_transform.weight"], f"grad{suffix}")
    with torch.no_grad():
        evaluated = quantizer.eval().quantize(last(z))
    assert evaluated.terms is None
    torch.testing.assert_close(evaluated.vectors, last(t["eval_quantized"]), atol=2e-6, rtol=0)


def test_each_term_moves_one_side_only() -> None:
    quantizer = SimVQ(SimVQConfig(32, 4)).train()
    z = torch.randn(5, 4, requires_grad=True)
    terms = quantizer.quantize(z).terms
    assert terms is not None
    assert torch.autograd.grad(terms.codebook, z, retain_graph=True, allow_unused=True)[0] is None
    commitment = torch.autograd.grad(terms.commitment, quantizer.transform.weight, allow_unused=True)[0]
    assert commitment is None
    assert [name for name, _ in quantizer.named_parameters()] == ["transform.weight"]


def test_codes_cannot_be_revived() -> None:
    with pytest.raises(ValueError, match="frozen by design"):
        SimVQ(SimVQConfig(8, 2)).set_codes(torch.zeros(1, dtype=torch.int64), torch.zeros(1, 2))
