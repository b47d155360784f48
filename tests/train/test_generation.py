"""MAR training at a reduced size: it runs, survives, divides, leaves its files; the configurations are whole."""

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState
from PIL import Image

import tokenizers_mm as tmm
from tests.cases import ROOT
from tokenizers_mm.data.scenes import make_scene
from tokenizers_mm.models import MAR
from train.checkpoint import list_checkpoints
from train.generation import main, run
from train.generation_config import CaptionEmbeddingConfig, GenerationConfig, read_generation_config
from train.generation_state import CaptionEmbedding
from train.log import read_log

SCENES = str(ROOT / "configs" / "mar_scenes.yaml")
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
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
def _one_precision(one_thread: None) -> Iterator[None]:
    """Accelerate allows one precision per process."""
    AcceleratorState._reset_state(True)
    yield
    AcceleratorState._reset_state(True)


def smaller(out: Path, *overrides: str) -> list[str]:
    """Overrides of the configuration of scenes; later ones win."""
    return list({item.partition("=")[0]: item for item in [*SMALLER, f"out={out}", *overrides]}.values())


def configured(out: Path, *overrides: str) -> GenerationConfig:
    return read_generation_config(SCENES, smaller(out, *overrides))


def last_state(out: Path) -> dict[str, Any]:
    return torch.load(list_checkpoints(out)[-1][1] / "state.pt", weights_only=True)


def assert_same_networks(a: dict[str, Any], b: dict[str, Any], atol: float) -> None:
    assert [a[name] for name in ("step", "stage", "begun")] == [b[name] for name in ("step", "stage", "begun")]
    assert a["latent_scale"] == pytest.approx(b["latent_scale"], rel=1e-5)
    for part in ("model", "average"):
        for name in a[part]:
            torch.testing.assert_close(a[part][name], b[part][name], rtol=0, atol=atol, msg=f"{part}.{name}")


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_short_run(tmp_path: Path, precision: str) -> None:
    sources = "data.sources=[{kind: scenes, weight: 1.0}, {kind: photographs, weight: 1.0}]"
    options = ["steps=7", f"precision='{precision}'", "save_every=4", sources]
    summary = run(configured(tmp_path / "run", *options))
    assert summary["scenes"] == 4
    assert summary["right_colour_real"] == 1.0
    names = {path.name for path in (tmp_path / "run").iterdir()}
    pictures = {"curves.png", "samples.png", "lower_halves.png", "autoencoder.png"}
    assert pictures | {"log.jsonl", "summary.json", "tokenizer", "captions.safetensors", "checkpoints"} == names - {
        "tensorboard"
    }
    lines = read_log(tmp_path / "run" / "log.jsonl")
    assert [line["step"] for line in lines] == [2, 4, 6, 7]
    assert ["autoencoder loss" in line for line in lines] == [True, True, False, False]
    assert ["noise" in line for line in lines] == [False, True, True, True]
    assert [step for step, _ in list_checkpoints(tmp_path / "run")] == [4, 7]
    check_pictures(tmp_path / "run")
    tokenizer = tmm.load(tmp_path / "run" / "tokenizer")
    assert isinstance(tokenizer, MAR)
    values = tokenizer.encode(torch.rand(4, 3, 32, 32) * 2 - 1).values
    assert 0.1 < float(values.std()) < 10  # the measured scale
    further = [f"start_from={tmp_path / 'run'}", "autoencoder.steps=0", "steps=1", "scenes=0"]
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


def test_killed_in_either_stage_and_resumed(tmp_path: Path) -> None:
    """SIGKILL at a random step of each stage; the networks and the last losses are those of an unbroken run."""
    options = ["scenes=0", "autoencoder.steps=8", "steps=20", "save_every=3", "keep=1", "log_every=1"]
    run(configured(tmp_path / "whole", *options))
    rng, out = random.Random(time.time_ns()), tmp_path / "broken"
    command = [sys.executable, "-m", "train.generation", SCENES, *smaller(out, *options, "data.workers=1")]
    log = out / "log.jsonl"
    for target in (rng.randint(1, 7), rng.randint(9, 18)):
        process = subprocess.Popen(command, cwd=ROOT, env=ENVIRONMENT, stderr=subprocess.DEVNULL)
        while process.poll() is None and not (log.exists() and log.read_text().count("\n") >= target):
            time.sleep(0.005)
        process.send_signal(signal.SIGKILL)
        process.communicate()
    subprocess.run(command, cwd=ROOT, env=ENVIRONMENT, check=True, capture_output=True)
    assert [step for step, _ in list_checkpoints(out)] == [20]
    assert_same_networks(last_state(tmp_path / "whole"), last_state(out), 1e-6)
    a, b = read_log(tmp_path / "whole" / "log.jsonl"), read_log(log)
    assert [line["step"] for line in a] == [line["step"] for line in b] == list(range(1, 21))
    assert b[-1]["noise"] == pytest.approx(a[-1]["noise"], abs=1e-6)


def test_a_finished_run_goes_on_or_begins_anew(tmp_path: Path) -> None:
    options = ["scenes=0", "autoencoder.steps=2", "optimizer.schedule=constant", "log_every=1"]
    run(configured(tmp_path / "whole", *options, "steps=7"))
    run(configured(tmp_path / "parts", *options, "steps=5"))
    run(configured(tmp_path / "parts", *options, "steps=7"))
    assert_same_networks(last_state(tmp_path / "whole"), last_state(tmp_path / "parts"), 0)
    run(configured(tmp_path / "parts", *options, "steps=3", "resume=never", "seed=1"))
    assert [step for step, _ in list_checkpoints(tmp_path / "parts")] == [3]
    assert len(read_log(tmp_path / "parts" / "log.jsonl")) == 3
    AcceleratorState._reset_state(True)
    with pytest.raises(ValueError, match=r"checkpoint: expected model of this configuration, got"):
        run(configured(tmp_path / "parts", *options, "model.noise_repeats=1", "captions.buckets=16"))


def test_two_ranks_or_two_parts_learn_as_one_large_batch(tmp_path: Path) -> None:
    """Two processes of 2 samples, one of 2 in two parts, and one of 4 see the same samples and draw the same chance."""
    options = ["scenes=0", "autoencoder.steps=3", "steps=7", "log_every=1", "drop=0.5"]
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "-m"]
    command = [*launch, "train.generation", SCENES, *smaller(tmp_path / "two", *options, "batch_size=2")]
    subprocess.run(command, cwd=ROOT, env=ENVIRONMENT, check=True, capture_output=True)
    run(configured(tmp_path / "one", *options, "batch_size=4"))
    run(configured(tmp_path / "parts", *options, "batch_size=2", "accumulate=2"))
    expected = read_log(tmp_path / "one" / "log.jsonl")
    assert len(expected) == 7
    for other in ("two", "parts"):
        for a, b in zip(expected, read_log(tmp_path / other / "log.jsonl"), strict=True):
            assert a.keys() == b.keys()
            for name in a.keys() - {"seconds"}:
                assert b[name] == pytest.approx(a[name], rel=1e-3), (other, name)
        # Adam divides by the size of the gradient, so rounding moves a weight whose gradient is nothing but rounding.
        assert_same_networks(last_state(tmp_path / "one"), last_state(tmp_path / other), 2e-4)


@pytest.mark.parametrize("size", PUBLISHED)
def test_published_configurations(size: str) -> None:
    config = read_generation_config(str(ROOT / "configs" / f"mar_{size}.yaml"), [])
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
    for override, message in (
        ("stepz=3", "config.stepz: unknown key; did you mean 'steps'"),
        ("steps=800", "config.steps: expected more than autoencoder.steps, got 800"),
        ("accumulate=0", "config.accumulate: expected at least 1, got 0"),
        ("data.image_size=[32,32]", "config.data: expected sizes to be said by config.image_size"),
        ("device=xpu", "config.device: expected one that is here, such as"),
    ):
        assert main([SCENES, override]) == 2
        assert message in capsys.readouterr().err
    assert main([]) == 2
