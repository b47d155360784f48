"""SimVQ against DualViTok's original code: values, ids, loss, and which gradient reaches what."""

import json
from functools import partial
from typing import cast

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from tests.cases import case, near
from tests.dualvitok_weights import by_rule
from tokenizers_mm.functional.scalar import ids_to_levels, levels_to_ids
from tokenizers_mm.quantizers.fsq import FSQ, FSQConfig
from tokenizers_mm.quantizers.residual import ResidualConfig, ResidualQuantizer
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


close = partial(near, rtol=1e-3, atol=1e-6)


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
        return weight * (
            terms["codebook"] + options.get("input_to_quantize_commit_loss_weight", 0.25) * terms["commitment"]
        )

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
    assert torch.autograd.grad(terms["codebook"], z, retain_graph=True, allow_unused=True)[0] is None
    commitment = torch.autograd.grad(terms["commitment"], quantizer.transform.weight, allow_unused=True)[0]
    assert commitment is None
    assert [name for name, _ in quantizer.named_parameters()] == ["transform.weight"]


def test_codes_cannot_be_revived() -> None:
    with pytest.raises(ValueError, match="frozen by design"):
        SimVQ(SimVQConfig(8, 2)).set_codes(torch.zeros(1, dtype=torch.int64), torch.zeros(1, 2))


def test_residual_of_three() -> None:
    own = case("dualvitok/quantizer")
    description = json.loads((own.folder / "cases.json").read_text())["residual"]
    t = load_file(own.folder / "residual.safetensors")
    quantizer = ResidualQuantizer(ResidualConfig(SimVQConfig(64, 8), 3)).train()
    stages = cast("list[SimVQ]", list(quantizer.stages))
    for index, stage in enumerate(stages):
        names = {"frozen": "frozen_codebook", "transform.weight": "code_transform.weight"}
        shapes, place = description["weight_keys"], f"layers.{index}."
        state = {k: by_rule(f"q.{place}{v}", shapes[place + v], description["seed"], {}) for k, v in names.items()}
        stage.load_state_dict(state)
    z = t["z"].requires_grad_()
    result = quantizer.quantize(z.movedim(1, -1))
    assert torch.equal(result.ids, t["indices"])
    torch.testing.assert_close(result.vectors, t["quantized"].movedim(1, -1), atol=1e-6, rtol=0)
    looked_up = quantizer.look_up(result.ids)
    torch.testing.assert_close(looked_up, t["output_from_indices"].movedim(1, -1), atol=1e-6, rtol=0)
    assert result.terms is not None
    loss = result.terms["codebook"] + 0.25 * result.terms["commitment"]
    torch.testing.assert_close(loss, t["loss"], rtol=1e-5, atol=0)
    total = (result.vectors * t["g"].movedim(1, -1)).sum() + loss
    weights = [stage.transform.weight for stage in stages]
    for objective, suffix in ((loss, "_loss_only"), (total, "")):
        to_z, *to_weights = torch.autograd.grad(objective, (z, *weights), retain_graph=True)
        close(to_z, t[f"grad_z{suffix}"], f"grad_z{suffix}")
        for index, gradient in enumerate(to_weights):
            close(gradient, t[f"grad{suffix}.layers.{index}.code_transform.weight"], f"grad{suffix} {index}")
    with pytest.raises(ValueError, match="stage: expected a quantizer with one id per vector"):
        ResidualQuantizer(ResidualConfig(ResidualConfig(SimVQConfig(64, 8), 2), 2))


def test_fsq() -> None:
    own = case("dualvitok/quantizer")
    options = json.loads((own.folder / "cases.json").read_text())["fsq"]["kw"]
    t = load_file(own.folder / "fsq.safetensors")
    quantizer = FSQ(FSQConfig(tuple(options["levels"]), options["dim"])).train()
    quantizer.load_state_dict({k.removeprefix("state."): v for k, v in t.items() if k.startswith("state.")})
    z = t["z"].requires_grad_()
    result = quantizer.quantize(z.movedim(1, -1))
    assert quantizer.codebook_size == 1000
    assert torch.equal(result.ids, t["indices"].long())
    torch.testing.assert_close(result.vectors, t["quantized"].movedim(1, -1), atol=2e-6, rtol=0)
    torch.testing.assert_close(quantizer.look_up(result.ids), t["indices_to_codes"].movedim(1, -1), atol=2e-6, rtol=0)
    everything = torch.arange(1000)
    assert torch.equal(levels_to_ids(ids_to_levels(everything, (8, 5, 5, 5)), (8, 5, 5, 5)), everything)
    assert result.terms is not None
    assert result.terms == {}
    assert float(t["loss"]) == 0
    (result.vectors * t["g"].movedim(1, -1)).sum().backward()
    close(z.grad, t["grad_z"], "grad_z")  # type: ignore[arg-type]
    for name, parameter in quantizer.named_parameters():
        assert parameter.grad is not None
        close(parameter.grad, t[f"grad.{name}"], name)
    for refuse in (quantizer.set_codes, ResidualQuantizer(ResidualConfig(SimVQConfig(8, 6), 1)).set_codes):
        with pytest.raises(ValueError, match="got a request for it"):
            refuse(torch.zeros(1, dtype=torch.int64), torch.zeros(1, 6))
