"""The bridge's training program: each objective and choice of what learns, ranks, accumulation, kill and resume."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.bridge_data import DEBUG, arguments, make_folder, train
from tests.cases import ROOT
from tests.models.test_tokenflow import tiny_config
from tokenizers_mm.llm import VisualVocabulary, next_token_loss
from tokenizers_mm.models import TokenFlow
from train.__main__ import main
from train.checkpoint import list_checkpoints

pytestmark = pytest.mark.usefixtures("one_thread")
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    return make_folder(tmp_path_factory.mktemp("bridge"), TokenFlow.from_config(tiny_config()).eval())


@pytest.fixture(scope="module")
def unbroken(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of features and a projector that was left alone."""
    out = tmp_path_factory.mktemp("unbroken")
    train(folder, out, "features", **FEATURES)
    return out


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


def newest(out: Path) -> dict[str, Any]:
    """What the newest checkpoint of a run holds."""
    return torch.load(list_checkpoints(out)[-1][1] / "state.pt", weights_only=True)


def assert_same_weights(one: Path, other: Path) -> None:
    """Of the newest checkpoints, language model and projector, and of the finished models."""
    a, b = newest(one), newest(other)
    assert (a["step"], a["rows"]) == (b["step"], b["rows"])
    assert a["learning"].keys() == b["learning"].keys()
    for name, tensor in a["learning"].items():
        torch.testing.assert_close(b["learning"][name], tensor, rtol=0, atol=1e-6, msg=name)
    torch.testing.assert_close(table(other), table(one), rtol=0, atol=1e-6)


def test_killed_at_a_random_step_and_resumed(folder: Path, unbroken: Path, tmp_path: Path) -> None:
    """SIGKILL wherever it is; the weights, the projector and the last loss are those of the run left alone."""
    rng = random.Random(time.time_ns())
    command = [sys.executable, "-m", "train", *arguments(folder, tmp_path, "features", **FEATURES)]
    log, target = tmp_path / "log.jsonl", rng.randrange(1, 20)
    process = subprocess.Popen(command, cwd=ROOT, env=ENVIRONMENT, stderr=subprocess.PIPE)
    while process.poll() is None and not (log.exists() and f'"step": {target},' in log.read_text()):
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    lines = train(folder, tmp_path, "features", **FEATURES)
    assert [line["step"] for line in lines] == list(range(1, 21))
    assert len(list_checkpoints(tmp_path)) == 1
    assert "projector.parts.0.0.weight" in newest(tmp_path)["learning"]
    assert_same_weights(unbroken, tmp_path)
    expected = json.loads((unbroken / "log.jsonl").read_text().splitlines()[-1])["loss"]
    assert lines[-1]["loss"] == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("more", [{"objective": "masked_diffusion", "mask_token": "<mask>"}, {"learns": "lora"}])
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
        assert not [name for name in newest(halves)["learning"] if "base_layer" in name]


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


def test_two_ranks_learn_as_one_with_a_batch_of_both(folder: Path, tmp_path: Path) -> None:
    options: dict[str, Any] = {"steps": 3, "log_every": 1, "save_every": 3, "optimizer.clip": 100}
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "-m", "train"]
    command = [*launch, *arguments(folder, tmp_path / "two", batch_size=3, **options)]
    subprocess.run(command, cwd=ROOT, env=ENVIRONMENT, check=True, capture_output=True)
    one = train(folder, tmp_path / "one", batch_size=6, **options)
    two = [json.loads(line) for line in (tmp_path / "two" / "log.jsonl").read_text().splitlines()]
    assert_same_lines(one, two)
    assert newest(tmp_path / "one")["rows"] == newest(tmp_path / "two")["rows"] == 18


def test_a_run_started_anew_forgets_the_one_before(folder: Path, tmp_path: Path) -> None:
    train(folder, tmp_path, steps=4, save_every=2)
    lines = train(folder, tmp_path, steps=3, save_every=2, log_every=1, resume="never", seed=1)
    assert [line["step"] for line in lines] == [1, 2, 3]
    assert [step for step, _ in list_checkpoints(tmp_path)] == [2, 3]


def test_bf16_trains_packed_rows(folder: Path, tmp_path: Path) -> None:
    lines = {}
    for precision in ("fp32", "bf16"):
        AcceleratorState._reset_state(True)  # it allows one precision per process
        lines[precision] = train(folder, tmp_path / precision, precision=precision, pack=120, steps=4, log_every=4)
    AcceleratorState._reset_state(True)
    assert {tensor.dtype for tensor in newest(tmp_path / "bf16")["learning"].values()} == {torch.float32}
    assert lines["bf16"][-1]["loss"] != lines["fp32"][-1]["loss"]
    assert lines["bf16"][-1]["loss"] == pytest.approx(lines["fp32"][-1]["loss"], rel=0.02)


def test_adapters(folder: Path, tmp_path: Path) -> None:
    pytest.importorskip("peft")
    train(folder, tmp_path / "a", learns="lora", steps=5)
    AutoModelForCausalLM.from_pretrained(tmp_path / "a")


def test_bad_configurations_get_one_sentence(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    common = [DEBUG, f"tokenizer={folder / 'tokenizer'}", f"language_model.text_tokenizer={folder / 'text'}"]
    good = f"records=[{{path: {folder}/ids.jsonl}}]"
    for extra, message in [
        ([good, "objectives=next_token"], "config.objectives: unknown key; did you mean 'objective'?"),
        (["records=[{path: nowhere.jsonl}]"], "records: expected a JSONL file, got nowhere.jsonl"),
        ([good, "language_model.source=nowhere"], "language_model: expected either source or kind"),
        ([good, "language_model.kind=poem"], "language_model: expected a causal language model"),
        ([good, "objective=masked_diffusion"], "mask_token: expected a token of the text tokenizer, got nothing"),
        ([good, "batch_size=0"], "config.batch_size: expected at least 1, got 0"),
        ([good, "features=streams"], "features: expected tokenizer (no streams here), got streams"),
        ([good, "objective=masked_diffusion", "mask_token=<no>"], "mask_token: expected a token of the text tokenizer"),
        ([good, "learns=new_rows", "optimizer.weight_decay=0.1"], "optimizer.weight_decay: expected 0"),
    ]:
        assert main([*common, "out=/nowhere", *extra]) == 2
        assert message in capsys.readouterr().err


def test_a_run_that_cannot_go_on_gets_one_sentence(
    folder: Path,
    unbroken: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Another configuration, a checkpoint of something else, a record that is no record, a loss that is no number."""
    checkpoint = list_checkpoints(unbroken)[-1][1]
    config = (checkpoint / "config.json").read_text()

    def refused(out: Path, records: str = "features", *more: str) -> str:
        assert main([*arguments(folder, out, records, **FEATURES), *more]) == 2
        return capsys.readouterr().err

    assert "(or resume=never), got another seed" in refused(unbroken, "features", "seed=1")
    for name, content, message in [
        ("other", {"weights": torch.zeros(1)}, "expected the parts of this configuration, got a difference in"),
        ("mine", {**newest(unbroken), "learning": {"w": torch.zeros(1)}}, "expected learning of this configuration"),
        ("code", subprocess.run, "state.pt: expected a whole checkpoint, got UnpicklingError"),
    ]:
        place = tmp_path / name / "checkpoints" / "step_000000005"
        place.mkdir(parents=True)
        torch.save(content, place / "state.pt")
        changed = json.loads(config) | {"out": str(tmp_path / name)}
        (place / "config.json").write_text(json.dumps(changed))
        assert message in refused(tmp_path / name)
    (folder / "bad.jsonl").write_text('{"content": [{"picture": "0.png"}]}')
    assert "bad.jsonl row 0: expected parts with one of text, image, codes" in refused(tmp_path / "bad", "bad")
    (folder / "silent.jsonl").write_text('{"content": [{"text": "red", "learn": false}]}')
    assert "records: expected rows with something to learn" in refused(tmp_path / "silent", "silent")
    monkeypatch.setattr("train.bridge_state.next_token_loss", lambda *given: next_token_loss(*given) * torch.nan)
    assert "gradients are not finite at step 0" in refused(tmp_path / "nan")
