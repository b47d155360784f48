"""The released TokenFlow runs: each configuration builds at full size, and takes steps at a reduced one."""

from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator

import tokenizers_mm as tmm
from tests.cases import ROOT
from tokenizers_mm.config import from_mapping, read_yaml, to_mapping
from tokenizers_mm.data.sources import Batch
from tokenizers_mm.models import TokenFlow, TokenFlowConfig
from tokenizers_mm.models.loading import build
from train.config import parse_config, read_config
from train.state import build_state
from train.step import train_step

SIZES = {  # of the released models, from the specification of their files
    "clipb_224": (182_033_323 - 131_072, 561),
    "vitamin_256": (560_095_217 - 131_072 - 6, 817),
    "siglip_384": (523_529_803, 2227),
    "clipb_256_enhanced": (376_700_715 - 131_072, 817),
}
ZERO_BIASES = {"clipb_224": 3 * 768, "vitamin_256": 3 * 1152, "siglip_384": 3 * 1152, "clipb_256_enhanced": 3 * 768}
"""We hold a key bias in the semantic decoder, which is always zero in a released model and never matters."""


def path(name: str) -> str:
    return str(ROOT / "configs" / f"tokenflow_{name}.yaml")


@pytest.mark.parametrize("name", SIZES)
def test_full_size_configuration_is_the_released_model(name: str) -> None:
    config = read_config(path(name), [])
    tokenizer = build(TokenFlow, from_mapping(TokenFlowConfig, config.objective.model.config))
    count = sum(p.numel() for p in tokenizer.parameters())
    positions = 2 * 60 * 768 if name == "clipb_256_enhanced" else 0  # its files hold those of 224
    assert count == SIZES[name][0] + ZERO_BIASES[name] + positions
    assert tokenizer.streams(*config.objective.model.config["image_size"])[0].num_ids == SIZES[name][1]
    config = config.objective
    assert (config.optimizer.lr, config.optimizer.betas, config.optimizer.clip) == (1e-4, (0.9, 0.95), 1.0)
    assert (config.loss.gan_start, config.loss.weights["generator"], config.scale_drop) == (20000, 0.5, 0.1)
    assert config.loss.pixel == "l2"


def reduced_model(data: dict[str, Any]) -> None:
    """The same objective with small networks and without downloads; images, scales, terms and recipe stay."""
    model = data["model"]["config"]
    small: dict[str, Any] = {"embed_dim": 48, "depth": 1, "num_heads": 2}
    if "vitamin" in model["semantic_encoder"]["name"]:
        small["embed_cfg"] = {"embed_dim": [16, 24, 48], "depths": [1, 1, 1], "stem_width": 16}
    towers = [model["semantic_encoder"], *([data["loss"]["teacher"]] if "teacher" in data["loss"] else [])]
    for tower in towers:
        tower["options"] |= small
        tower["pretrained"] = False
    model["quantizer"]["codebook_size"] = 128
    model["semantic_decoder"] |= {"width": 48, "depth": 1, "heads": 2}
    if "teacher" in data["loss"] and data["loss"]["teacher"]["features"] == "last":
        model["semantic_decoder"]["out_dim"] = 48
    for part in ("pixel_encoder", "pixel_decoder"):
        wider = 2 if model[part]["channels"] == 256 else 1  # the enhanced decoder stays the larger one
        model[part] |= {"channels": 16 * wider, "multipliers": [1] * 5, "num_blocks": wider, "num_groups": 8}
    model["pixel_encoder"]["out_channels"] = model["pixel_decoder"]["in_channels"] = 16


def reduced(name: str) -> dict[str, Any]:
    """A run of two steps with the reduced model."""
    run = read_yaml(path(name))
    data = run["objective"]
    reduced_model(data)
    data["loss"] |= {"gan_start": 1, "discriminator": {"channels": 8, "num_layers": 2, "norm": "batch"}}
    data["loss"]["weights"]["perceptual"] = 0.0  # needs VGG's weights
    return run | {"precision": "fp32", "batch_size": 1, "steps": 2}


def take_steps(data: dict[str, Any]) -> tuple[TokenFlow, dict[str, torch.Tensor], list[dict[str, float]]]:
    """The tokenizer after two steps on one random image, its state before, and the reports."""
    state = build_state(parse_config(data), Accelerator(cpu=True))
    tokenizer = state.objective.networks["tokenizer"]
    before = {name: tensor.clone() for name, tensor in tokenizer.state_dict().items()}
    size = data["objective"]["model"]["config"]["image_size"]
    batch = Batch(torch.rand(1, 3, *size, generator=torch.Generator().manual_seed(2)) * 2 - 1, [""], [])
    reports = [train_step(state, [batch])[0] for _ in range(2)]
    assert isinstance(tokenizer, TokenFlow)
    return tokenizer, before, reports


@pytest.mark.parametrize("name", ["clipb_224", "vitamin_256", "siglip_384"])
def test_steps_at_a_reduced_size(name: str) -> None:
    tokenizer, before, reports = take_steps(reduced(name))
    terms = {"pixel", "semantic", "codebook", "commitment", "loss"}
    assert terms <= reports[0].keys()
    assert {"generator", "discriminator"} <= reports[1].keys() - reports[0].keys()
    assert all(torch.isfinite(torch.tensor(list(report.values()))).all() for report in reports)
    after = tokenizer.state_dict()
    for part in ("semantic_encoder.", "pixel_encoder.", "quantizer.", "semantic_decoder.", "pixel_decoder."):
        moved = [name for name in after if name.startswith(part) and not torch.equal(after[name], before[name])]
        assert moved, part
    assert max(float((after[n] - before[n]).abs().max()) for n in after) < 1e-3  # two steps of Adam at 1e-4


def test_only_a_new_decoder_learns_on_frozen_codes(tmp_path: Path) -> None:
    start = from_mapping(TokenFlowConfig, reduced("clipb_224")["objective"]["model"]["config"])
    torch.manual_seed(1)
    saved = TokenFlow.from_config(start)
    saved.save(tmp_path / "start")
    data = reduced("clipb_256_enhanced")
    data["objective"]["model"]["start_from"] = str(tmp_path / "start")
    tokenizer, before, reports = take_steps(data)
    assert "pixel" in reports[0]
    assert not {"semantic", "codebook", "commitment"} & reports[0].keys()
    after, source = tokenizer.state_dict(), saved.state_dict()
    for name in after:
        if name.startswith("pixel_decoder."):
            continue
        assert torch.equal(after[name], before[name]), name
        if not name.endswith(("pos_embed", "positions")):
            assert torch.equal(after[name], source[name]), name
    moved = [n for n in after if n.startswith("pixel_decoder.") and not torch.equal(after[n], before[n])]
    assert len(moved) > 50
    assert tokenizer.encode(torch.zeros(1, 3, 256, 256)).ids.shape == (1, 817)

    data["objective"]["model"]["reinit"] = []
    with pytest.raises(ValueError, match=r"config.objective.model.start_from: expected equal tensors .* pixel_decoder"):
        take_steps(data)


def test_fresh_parts_need_a_model_to_start_from(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"config.objective.model.reinit: expected a config and a start_from"):
        read_config(path("clipb_256_enhanced"), ["objective.model.start_from=''"])


def test_a_run_may_go_on_from_a_saved_tokenizer(tmp_path: Path) -> None:
    config = from_mapping(TokenFlowConfig, reduced("clipb_224")["objective"]["model"]["config"])
    TokenFlow.from_config(config).save(tmp_path / "start")
    data = reduced("clipb_224")
    data["objective"]["model"] = {"start_from": str(tmp_path / "start")}
    tokenizer: Any = build_state(parse_config(data), Accelerator(cpu=True)).objective.networks["tokenizer"]
    assert to_mapping(tokenizer.config) == to_mapping(config)
    assert torch.equal(next(tokenizer.parameters()), next(tmm.load(tmp_path / "start").parameters()))
