"""Training of a language model: each method and choice of what learns. Resume, ranks: test_every_objective.py."""

from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks.tiny import tokenflow_config as tiny_config
from tests.language_data import arguments, make_folder, train
from tests.train.kinds import final
from tokenizers_mm.llm import VisualVocabulary, next_token_loss
from tokenizers_mm.models import TokenFlow
from train.__main__ import main

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    return make_folder(tmp_path_factory.mktemp("language"), TokenFlow.from_config(tiny_config()).eval())


FEATURES: dict[str, Any] = {"projector": "gelu", "log_every": 1, "save_every": 5, "keep": 1}


def table(place: Path) -> torch.Tensor:
    """The embeddings of a saved model."""
    model: Any = AutoModelForCausalLM.from_pretrained(place)
    return model.get_input_embeddings().weight.detach()


def test_a_new_model_learns_and_goes_on(folder: Path, tmp_path: Path) -> None:
    log = train(folder, tmp_path / "a", pack=120)
    assert log[-1]["loss"] < log[0]["loss"]
    text = AutoTokenizer.from_pretrained(tmp_path / "a")
    vocabulary = VisualVocabulary.load(tmp_path / "a")
    assert len(text) == vocabulary.text_size
    before = table(tmp_path / "a")
    more = {"language_model.source": tmp_path / "a", "language_model.text_tokenizer": "''", "language_model.kind": "''"}
    train(folder, tmp_path / "b", learns="new_rows", steps=5, **more)
    after = table(tmp_path / "b")
    assert VisualVocabulary.load(tmp_path / "b") == vocabulary
    assert torch.equal(after[: vocabulary.text_size], before[: vocabulary.text_size])
    assert not torch.equal(after, before)


def assert_same_weights(one: Path, other: Path) -> None:
    """Compare the newest checkpoints, language model and projector, and the finished models."""
    a, b = final(one), final(other)
    assert (a["counters"]["step"], a["counters"]["samples"]) == (b["counters"]["step"], b["counters"]["samples"])
    assert a["network learning"].keys() == b["network learning"].keys()
    for name, tensor in a["network learning"].items():
        torch.testing.assert_close(b["network learning"][name], tensor, rtol=0, atol=1e-6, msg=name)
    torch.testing.assert_close(table(other), table(one), rtol=0, atol=1e-6)


@pytest.mark.parametrize("more", [{"method": "masked_diffusion", "mask_token": "<mask>"}, {"learns": "lora"}])
def test_stopped_and_resumed(folder: Path, tmp_path: Path, more: dict[str, Any]) -> None:
    """The draws of masked diffusion go on where they were; a checkpoint of adapters holds only what learns."""
    if "learns" in more:
        pytest.importorskip("peft")
    whole, halves = tmp_path / "whole", tmp_path / "halves"
    options = {"optimizer.schedule": "constant", "save_every": 3, **more}
    train(folder, whole, steps=6, **options)
    train(folder, halves, steps=3, **options)
    train(folder, halves, steps=6, **options)
    assert_same_weights(whole, halves)
    if "learns" in more:
        assert not [name for name in final(halves)["network learning"] if "base_layer" in name]


def assert_same_lines(one: list[dict[str, float]], other: list[dict[str, float]]) -> None:
    """The first step up to the order of sums in float32; later ones with what Adam makes of that."""
    for a, b in zip(one, other, strict=True):
        assert a["labels"] == b["labels"]
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-5 if a["step"] == 1 else 1e-3)
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-5 if a["step"] == 1 else 1e-3)


@pytest.mark.parametrize("pack", [0, 120])
def test_accumulation_equals_a_large_batch(folder: Path, tmp_path: Path, pack: int) -> None:
    """Rows that draw have many labels, rows that tell have few: each label weighs the same."""
    options: dict[str, Any] = {"steps": 3, "log_every": 1, "pack": pack, "optimizer.clip": 100}
    one = train(folder, tmp_path / "one", batch_size=6, **options)
    many = train(folder, tmp_path / "many", batch_size=2, accumulate=3, **options)
    assert_same_lines(one, many)


def test_bf16_trains_packed_rows(folder: Path, tmp_path: Path) -> None:
    lines = {}
    for precision in ("fp32", "bf16"):
        AcceleratorState._reset_state(True)  # it allows one precision per process
        lines[precision] = train(folder, tmp_path / precision, precision=precision, pack=120, steps=4, log_every=4)
    AcceleratorState._reset_state(True)
    assert {tensor.dtype for tensor in final(tmp_path / "bf16")["network learning"].values()} == {torch.float32}
    assert lines["bf16"][-1]["loss"] != lines["fp32"][-1]["loss"]
    assert lines["bf16"][-1]["loss"] == pytest.approx(lines["fp32"][-1]["loss"], rel=0.02)


def test_adapters(folder: Path, tmp_path: Path) -> None:
    pytest.importorskip("peft")
    train(folder, tmp_path / "a", learns="lora", steps=5)
    AutoModelForCausalLM.from_pretrained(tmp_path / "a")


def test_bad_configurations_get_one_sentence(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    good = arguments(folder, Path("/nowhere"))
    for extra, message in [
        (["objective.methods=x"], "config.objective.methods: unknown key; did you mean 'method'?"),
        (["language_model={}"], "config.language_model: expected as config.objective.language_model, got"),
        (
            ["objective=next_token"],
            "config.objective: expected a mapping {kind: language, method: next_token, ...}, got",
        ),
        (["objective.kind=poem"], "config.objective.kind: expected one of ['joint', 'language', 'mar', 'recon"),
        (["objective.records=[{path: nowhere.jsonl}]"], "records: expected a JSONL file, got nowhere.jsonl"),
        (["objective.language_model.source=nowhere"], "language_model: expected either source or kind"),
        (["objective.language_model.kind=poem"], "language_model: expected a causal language model"),
        (["objective.method=masked_diffusion"], "mask_token: expected a token of the text tokenizer, for masked_dif"),
        (
            ["objective.mask_token=<mask>"],
            "mask_token: expected a token of the text tokenizer, for masked_diffusion, got",
        ),
        (["batch_size=0"], "config.batch_size: expected"),
        (["ema=0.5"], "config.ema: expected 0 (kind: language), got 0.5"),
        (["objective.features=streams"], "features: expected tokenizer where there is no projector, got streams"),
        (["objective.features=streams", "objective.projector=gelu"], "features: expected tokenizer (no streams here)"),
        (["objective.lora_rank=3"], "lora_rank: expected nothing where learns is not lora, got 3"),
        (
            ["objective.method=masked_diffusion", "objective.mask_token=<no>"],
            "mask_token: expected a token of the text",
        ),
        (["objective.learns=new_rows", "objective.optimizer.weight_decay=0.1"], "optimizer.weight_decay: expected 0"),
    ]:
        assert main([*good, *extra]) == 2, extra
        assert message in capsys.readouterr().err


def test_a_run_that_cannot_go_on_gets_one_sentence(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A record that is no record, rows without labels, a loss that is no number."""

    def refused(out: Path, records: str = "features", *more: str) -> str:
        assert main([*arguments(folder, out, records, **FEATURES), *more]) == 2
        return capsys.readouterr().err

    (folder / "bad.jsonl").write_text('{"content": [{"picture": "0.png"}]}')
    assert "bad.jsonl row 0: expected parts with one of text, image, codes" in refused(tmp_path / "bad", "bad")
    (folder / "silent.jsonl").write_text('{"content": [{"text": "red", "learn": false}]}')
    assert "records: expected rows with something to learn" in refused(tmp_path / "silent", "silent")
    monkeypatch.setattr("train.objectives.language.next_token_loss", lambda *given: next_token_loss(*given) * torch.nan)
    assert "gradients of model." in (error := refused(tmp_path / "nan"))
    assert "are not finite at step 0" in error
