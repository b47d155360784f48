"""MAR training at a reduced size: its stages and its files. Resume, kills, ranks: test_every_objective.py."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState
from PIL import Image

import tokenizers_mm as tmm
from tests.cases import ROOT
from tokenizers_mm.data.scenes import make_scene
from tokenizers_mm.encoders.captions import CaptionEmbedding, CaptionEmbeddingConfig
from tokenizers_mm.models import MAR
from train.__main__ import main
from train.checkpoint import list_checkpoints
from train.config import RunConfig, read_config
from train.log import read_log
from train.loop import run

SCENES = str(ROOT / "configs" / "mar_scenes.yaml")
PUBLISHED = {"b": 207_924_768, "l": 478_326_304, "h": 942_403_104}
SMALLER = [
    "objective.data.image_size=[32,32]",
    "objective.model.encoder.grid=[4,4]",
    "objective.model.decoder.grid=[4,4]",
    "objective.model.encoder.depth=1",
    "objective.model.decoder.depth=1",
    "batch_size=4",
    "objective.autoencoder.steps=3",
    "objective.sampling.steps=3",
    "objective.sampling.diffusion='4'",
    "objective.scenes=4",
    "log_every=2",
]


@pytest.fixture(autouse=True)
def _one_precision(one_thread: None) -> Iterator[None]:
    """Accelerate allows one precision per process."""
    AcceleratorState._reset_state(True)
    yield
    AcceleratorState._reset_state(True)


def smaller(out: Path, *overrides: str) -> list[str]:
    """Overrides of the configuration of scenes; later ones win."""
    return list({item.partition("=")[0]: item for item in [*SMALLER, f"out={out}", *overrides]}.values())


def configured(out: Path, *overrides: str) -> RunConfig:
    return read_config(SCENES, smaller(out, *overrides))


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_short_run(tmp_path: Path, precision: str) -> None:
    sources = "objective.data.sources=[{kind: scenes, weight: 1.0}, {kind: photographs, weight: 1.0}]"
    options = ["steps=7", f"precision='{precision}'", "save_every=4", sources]
    assert main([SCENES, *smaller(tmp_path / "run", *options)]) == 0
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["scenes"] == 4
    assert summary["right_colour_real"] == 1.0
    names = {path.name for path in (tmp_path / "run").iterdir()}
    pictures = {"curves.png", "samples.png", "lower_halves.png", "autoencoder.png"}
    files = {"log.jsonl", "summary.json", "tokenizer", "captions.safetensors", "checkpoints"}
    assert pictures | files == names
    lines = [line for line in read_log(tmp_path / "run" / "log.jsonl") if "loss" in line]
    assert [line["step"] for line in lines] == [2, 3, 4, 6, 7]
    assert [line["stage"] for line in lines] == [0, 0, 1, 1, 1]
    assert ["divergence" in line for line in lines] == [True, True, False, False, False]
    assert ["noise" in line for line in lines] == [False, False, True, True, True]
    assert [step for step, _ in list_checkpoints(tmp_path / "run")] == [4, 7]
    check_pictures(tmp_path / "run")
    tokenizer = tmm.load(tmp_path / "run" / "tokenizer")
    assert isinstance(tokenizer, MAR)
    values = tokenizer.encode(torch.rand(4, 3, 32, 32) * 2 - 1).values
    assert 0.1 < float(values.std()) < 10  # the measured scale
    further = [
        f"objective.start_from={tmp_path / 'run'}",
        "objective.autoencoder.steps=0",
        "steps=1",
        "objective.scenes=0",
    ]
    run(configured(tmp_path / "more", *options, *further))
    again = tmm.load(tmp_path / "more" / "tokenizer")
    assert again.config == tokenizer.config
    assert torch.equal(
        again.encode(torch.zeros(1, 3, 32, 32)).values, tokenizer.encode(torch.zeros(1, 3, 32, 32)).values
    )


def check_pictures(folder: Path) -> None:
    """Four drawn pictures with words below them; two scenes and two other pictures, their lower halves filled in."""
    with Image.open(folder / "samples.png") as samples:
        assert samples.size == (4 * 200, 192 + 60)
        for column in range(4):
            words = samples.convert("L").crop((column * 200, 192, column * 200 + 192, 252))
            dark, light = words.getextrema()
            assert dark < 60  # type: ignore[operator]
            assert light == 255
    with Image.open(folder / "lower_halves.png") as halves:
        for column in range(4):
            scene = make_scene(column, "heldout").render(32).resize((64, 64), Image.Resampling.NEAREST)
            left = 4 + column * 68
            shown = halves.crop((left, 4, left + 64, 4 + 64))
            assert (shown.tobytes() == scene.tobytes()) == (column < 2)


@pytest.mark.parametrize("size", PUBLISHED)
def test_published_configurations(size: str) -> None:
    config = read_config(str(ROOT / "configs" / f"mar_{size}.yaml"), [])
    with torch.device("meta"):
        model = MAR.from_config(config.objective.model)
    own = sum(p.numel() for name, p in model.named_parameters() if not name.startswith("autoencoder."))
    assert own == PUBLISHED[size]


def test_captions_differ_by_word_and_by_place() -> None:
    embedding = CaptionEmbedding(16, CaptionEmbeddingConfig())
    vectors = embedding(["a red cat", "a blue cat", "red a cat", "a red cat"])
    assert torch.equal(vectors[0], vectors[3])
    assert all(not torch.allclose(vectors[0], vectors[i]) for i in (1, 2))


def test_bad_configuration_ends_with_a_sentence(capsys: pytest.CaptureFixture[str]) -> None:
    for override, message in (
        ("objective.sampler={}", "config.objective.sampler: unknown key; did you mean 'sampling'"),
        ("steps=800", "config.steps: expected at least 1 step in stage 1 (mar), got 800"),
        ("accumulate=0", "config.accumulate: expected"),
        ("image_size=32", "config.image_size: expected as config.objective.data.image_size, got"),
        (
            "objective.data.image_size=null",
            "config.objective.data.image_size: expected a square and no buckets, got None",
        ),
        ("device=xpu", "config.device: expected auto, cpu or cuda, got xpu"),
        ("objective.kind=joint", "config.objective"),
    ):
        assert main([SCENES, override]) == 2
        assert message in capsys.readouterr().err
    assert main([]) == 2
