"""MAR training at a reduced size: it runs, measures, leaves its files; the configurations are whole."""

import json
from pathlib import Path

import pytest
import torch

import tokenizers_mm as tmm
from tests.cases import ROOT
from tokenizers_mm.config import from_mapping, read_yaml
from tokenizers_mm.models import MAR
from train.generation import CaptionEmbedding, CaptionEmbeddingConfig, GenerationConfig, main, run

PUBLISHED = {"b": 207_924_768, "l": 478_326_304, "h": 942_403_104}
SMALLER = [
    "image_size=32",
    "model.encoder.grid=[4,4]",
    "model.decoder.grid=[4,4]",
    "model.encoder.depth=1",
    "model.decoder.depth=1",
    "batch_size=4",
    "autoencoder.steps=3",
    "sampling.steps=3",
    "sampling.diffusion='4'",
    "scenes=4",
    "log_every=2",
]


@pytest.fixture(autouse=True)
def _one_thread():
    """Tiny networks on few cores are faster so."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_short_run(tmp_path: Path, precision: str) -> None:
    overrides = [*SMALLER, f"out={tmp_path / 'run'}", "steps=4", f"precision='{precision}'", "save_every=4"]
    config = from_mapping(GenerationConfig, read_yaml(ROOT / "configs" / "mar_scenes.yaml", overrides))
    summary = run(config)
    assert summary["scenes"] == 4
    assert summary["right_colour_real"] == 1.0
    names = {path.name for path in (tmp_path / "run").iterdir()}
    assert {"log.jsonl", "curves.png", "samples.png", "lower_halves.png", "tokenizer", "captions.safetensors"} <= names
    lines = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [2, 2, 4]
    tokenizer = tmm.load(tmp_path / "run" / "tokenizer")
    assert isinstance(tokenizer, MAR)
    values = tokenizer.encode(torch.rand(4, 3, 32, 32) * 2 - 1).values
    assert 0.1 < float(values.std()) < 10  # the measured scale
    further = [*overrides, f"start_from={tmp_path / 'run'}", "autoencoder.steps=0", "steps=1", "scenes=0"]
    further = [item for item in further if not item.startswith(("out=", "log_every"))] + [f"out={tmp_path / 'more'}"]
    run(from_mapping(GenerationConfig, read_yaml(ROOT / "configs" / "mar_scenes.yaml", further)))
    again = tmm.load(tmp_path / "more" / "tokenizer")
    assert again.config == tokenizer.config
    assert torch.equal(
        again.encode(torch.zeros(1, 3, 32, 32)).values, tokenizer.encode(torch.zeros(1, 3, 32, 32)).values
    )


@pytest.mark.parametrize("size", PUBLISHED)
def test_published_configurations(size: str) -> None:
    config = from_mapping(GenerationConfig, read_yaml(ROOT / "configs" / f"mar_{size}.yaml"))
    with torch.device("meta"):
        model = MAR.from_config(config.model)
    own = sum(p.numel() for name, p in model.named_parameters() if not name.startswith("autoencoder."))
    assert own == PUBLISHED[size]


def test_captions_differ_by_word_and_by_place() -> None:
    embedding = CaptionEmbedding(16, CaptionEmbeddingConfig())
    vectors = embedding(["a red cat", "a blue cat", "red a cat", "a red cat"])
    assert torch.equal(vectors[0], vectors[3])
    assert all(not torch.allclose(vectors[0], vectors[i]) for i in (1, 2))


def test_bad_configuration_ends_with_a_sentence(capsys: pytest.CaptureFixture[str]) -> None:
    config = str(ROOT / "configs" / "mar_scenes.yaml")
    assert main([config, "stepz=3"]) == 2
    assert "config.stepz: unknown key; did you mean 'steps'" in capsys.readouterr().err
    assert main([]) == 2
