"""The demo at a tiny size: the same numbers twice, a prediction of the time, and a start from statistics."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import tokenizers_mm as tmm
from tests.cases import ROOT
from tokenizers_mm._images import image_to_tensor
from tokenizers_mm.data.photographs import fixed_crops
from tokenizers_mm.eval.image import psnr
from tokenizers_mm.eval.validation import reconstruct
from train.config import read_config
from train.demo import __main__ as program
from train.demo import judgement, language_model, shipped, tokenizer
from train.demo.clock import Clock
from train.state import build_state

TINY = program.Work(3, 7, 16)


@pytest.fixture
def tiny(one_thread: None, monkeypatch: pytest.MonkeyPatch) -> Any:
    for name, value in {"NUM_CROPS": 6, "NUM_PROBE_TRAIN": 64, "NUM_PROBE_TEST": 32}.items():
        monkeypatch.setattr(tokenizer, name, value)
    for name, value in {"NUM_HELDOUT": 4, "TOGETHER": 2, "SHOWN": 2, "CANDIDATES": 2}.items():
        monkeypatch.setattr(judgement, name, value)
    monkeypatch.setattr(language_model, "DRAWN", 2)
    monkeypatch.setattr(language_model, "TOLD", 2)
    monkeypatch.setattr(program, "QUICK", TINY)
    small = ["batch_size=4", "objective.data.workers=0", "objective.warm_start.images=24"]
    monkeypatch.setattr(program, "read_config", lambda path, overrides: read_config(path, [*overrides, *small]))
    deterministic = torch.are_deterministic_algorithms_enabled()
    yield
    torch.use_deterministic_algorithms(deterministic)


def test_two_runs_agree_to_the_last_digit(tiny: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    summaries = []
    for name in ("one", "two"):
        program.demo(tmp_path / name, quick=True)
        read = json.loads((tmp_path / name / "summary.json").read_text())
        assert read["train_steps"] == TINY.tokenizer_steps
        assert read["bridge_steps"] == TINY.language_steps
        assert read["parse_rate"] == 1.0
        summaries.append({key: value for key, value in read.items() if not key.endswith("seconds")})
    assert summaries[0] == summaries[1]
    shown = capsys.readouterr().err
    assert "On this machine this takes about" in shown
    assert all(f"[{number}/4]" in shown for number in range(1, 5))


def test_the_rest_is_predicted_from_what_is_over() -> None:
    clock = Clock({"a": 10.0, "b": 10.0, "c": 20.0})
    assert clock.left() == 40.0
    clock.spent = {"a": 20.0}
    clock._phase = "b"
    assert clock.left() == 60.0
    clock._phase, clock.spent = "c", {"a": 20.0, "b": 10.0}
    assert clock.left() == 30.0


def test_a_start_from_statistics_reconstructs_before_any_step(one_thread: None, tmp_path: Path) -> None:
    config = read_config(str(ROOT / "configs" / "demo.yaml"), [f"out={tmp_path}", "objective.data.workers=0"])
    crops = torch.stack([image_to_tensor(crop) for crop in fixed_crops("heldout", 12, 64)])
    found = []
    for images in (32, 96):
        start = replace(config.objective.warm_start, images=images)
        state = build_state(replace(config, objective=replace(config.objective, warm_start=start)))
        state.objective.begin(state.whole(), 0, 0)
        model: Any = state.objective.networks["tokenizer"].eval()
        found.append(float(psnr(crops, reconstruct(model, crops)[0]).mean()))
    assert found[0] > 20
    assert found[1] > found[0]


def test_a_start_needs_a_model_with_linear_paths() -> None:
    with pytest.raises(ValueError, match="warm_start: expected a tokenflow model with linear paths"):
        read_config(
            str(ROOT / "configs" / "demo.yaml"),
            ["objective.model.config.pixel_encoder.linear=none"],
        )


def test_publishing_writes_a_card_with_what_was_measured(
    one_thread: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in {"NUM_CROPS": 6, "NUM_PROBE_TRAIN": 32, "NUM_PROBE_TEST": 32}.items():
        monkeypatch.setattr(tokenizer, name, value)
    survival = {"classified": 8, "class_survives_top1": 0.25, "class_survives_top5": 0.5}
    monkeypatch.setattr(shipped, "class_survival", lambda _: survival)
    numbers = shipped.publish(tmm.load("tokenizers_mm/demo-64"), "demo_64", tmp_path, tmp_path / "folder")
    card = (tmp_path / "folder" / "README.md").read_text(encoding="utf-8")
    assert f"PSNR of 6 crops | {numbers['psnr_heldout']:.2f} dB" in card
    assert "25%, among its first five 50%" in card
    assert (tmp_path / "folder" / "card.png").is_file()
    again = tmm.load(tmp_path / "folder")
    assert again.provenance.license == "Apache-2.0"
    assert "chelsea" in card
