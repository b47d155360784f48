"""The bridge's training program: each objective, each choice of what learns, from one complete file."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.cases import ROOT
from tests.llm.fakes import words
from tests.models.test_tokenflow import tiny_config
from tokenizers_mm.llm import VisualVocabulary
from tokenizers_mm.models import TokenFlow
from train.__main__ import main

CONFIG = str(ROOT / "configs" / "bridge_debug.yaml")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tokenizer, a text tokenizer, and records that show images as ids and as features."""
    place = tmp_path_factory.mktemp("bridge")
    torch.manual_seed(0)
    tokenizer = TokenFlow.from_config(tiny_config()).eval()
    tokenizer.save(place / "tokenizer")
    words(["see the picture : red blue"], mask_token="<mask>").save_pretrained(str(place / "text"))
    lines: dict[str, list[Any]] = {"ids": [], "features": []}
    for index in range(4):
        picture = torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(index)) * 2 - 1
        tokenizer.to_pil(picture)[0].save(place / f"{index}.png")
        colour = ("red", "blue")[index % 2]
        image = {"image": f"{index}.png"}
        lines["ids"] += [[{"text": colour, "learn": False}, image], [{**image, "learn": False}, {"text": colour}]]
        lines["features"].append([{**image, "features": True}, {"text": colour}])
    for name, rows in lines.items():
        (place / f"{name}.jsonl").write_text("\n".join(json.dumps({"content": row}) for row in rows))
    return place


def train(folder: Path, out: Path, records: str = "ids", **options: Any) -> list[dict[str, float]]:
    arguments = [
        CONFIG,
        f"out={out}",
        f"tokenizer={folder / 'tokenizer'}",
        f"records=[{{path: {folder}/{records}.jsonl}}]",
    ]
    if "language_model.source" not in options:
        arguments.append(f"language_model.text_tokenizer={folder / 'text'}")
    assert main([*arguments, *(f"{key}={value}" for key, value in options.items())]) == 0
    return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]


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


def test_masked_diffusion_and_features(folder: Path, tmp_path: Path) -> None:
    log = train(folder, tmp_path / "a", objective="masked_diffusion", mask_token="<mask>")
    assert log[-1]["loss"] < log[0]["loss"]
    log = train(folder, tmp_path / "b", records="features", projector="gelu")
    assert log[-1]["loss"] < log[0]["loss"]
    assert (tmp_path / "b" / "projector.safetensors").is_file()


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")  # peft's own call
def test_adapters(folder: Path, tmp_path: Path) -> None:
    pytest.importorskip("peft")
    train(folder, tmp_path / "a", learns="lora", steps=5)
    AutoModelForCausalLM.from_pretrained(tmp_path / "a")


def test_bad_configurations_get_one_sentence(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    common = [CONFIG, f"tokenizer={folder / 'tokenizer'}", f"language_model.text_tokenizer={folder / 'text'}"]
    good = f"records=[{{path: {folder}/ids.jsonl}}]"
    for extra, message in [
        ([good, "objectives=next_token"], "config.objectives: unknown key; did you mean 'objective'?"),
        (["records=[{path: nowhere.jsonl}]"], "records: expected a JSONL file, got nowhere.jsonl"),
        ([good, "language_model.source=nowhere"], "language_model: expected either source or kind"),
        ([good, "language_model.kind=poem"], "language_model: expected a causal language model"),
        ([good, "objective=masked_diffusion"], "mask_token: expected a token of the text tokenizer, got nothing"),
        ([good, "learns=new_rows", "optimizer.weight_decay=0.1"], "optimizer.weight_decay: expected 0"),
    ]:
        assert main([*common, "out=/nowhere", *extra]) == 2
        assert message in capsys.readouterr().err
