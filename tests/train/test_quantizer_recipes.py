"""Every recipe in configs/quantizers: its weights are those of its quantizer's terms, and a step moves what learns."""

from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState

from tests.cases import ROOT
from tokenizers_mm.config import from_mapping
from tokenizers_mm.models import VQGAN, VQGANConfig
from tokenizers_mm.quantizers import QUANTIZERS
from train.__main__ import main
from train.config import read_config
from train.log import read_log

RECIPES = sorted((ROOT / "configs" / "quantizers").glob("*.yaml"))
UNTRAINED = {"per_dimension", "shared_index"}
"""Kinds for frozen features, and of the recipes of TokenFlow."""

pytestmark = pytest.mark.usefixtures("one_thread")


def test_every_kind_has_a_recipe() -> None:
    models = [read_config(str(path), []).objective.model.config for path in RECIPES]
    assert {model["quantizer"]["kind"] for model in models} == set(QUANTIZERS) - UNTRAINED


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_a_step_moves_all_parameters(path: Path) -> None:
    torch.manual_seed(0)
    objective = read_config(str(path), []).objective
    model = VQGAN.from_config(from_mapping(VQGANConfig, objective.model.config)).train()
    x = torch.rand(2, 3, 64, 64) * 2 - 1
    output = model.reconstruct(x)
    terms = {"pixel": (output.image - x).square().mean()}
    for quantized in output.quantized.values():
        terms |= dict(quantized.terms or {})
    assert set(terms) == set(objective.loss.weights)
    torch.stack([objective.loss.weights[name] * term for name, term in terms.items()]).sum().backward()
    idle = [name for name, parameter in model.named_parameters() if parameter.grad is None or not parameter.grad.any()]
    assert idle == []


@pytest.mark.filterwarnings("ignore")  # of accelerate and the data loader
def test_the_command_trains_one(tmp_path: Path) -> None:
    path = ROOT / "configs" / "quantizers" / "multi_codebook.yaml"
    edits = ["steps=2", "batch_size=2", "log_every=1", "sample_every=0", "save_every=0", "objective.data.workers=0"]
    assert main([str(path), f"out={tmp_path / 'run'}", "device=cpu", "objective.revival.every=1", *edits]) == 0
    AcceleratorState._reset_state(True)
    lines = [line for line in read_log(tmp_path / "run" / "log.jsonl") if "loss" in line]
    assert len(lines) == 2
    assert any(line["revived"] > 0 for line in lines)
