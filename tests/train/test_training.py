"""The training program: every part runs, nothing is lost when it is killed, accumulation equals a large batch."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState

import tokenizers_mm as tmm
from tests.cases import ROOT
from tokenizers_mm.data.sources import Batch
from train.checkpoint import list_checkpoints
from train.config import TrainConfig, read_config
from train.log import read_log
from train.loop import run
from train.state import build_state
from train.step import train_step

pytestmark = pytest.mark.usefixtures("one_thread")
DEBUG = str(ROOT / "configs" / "debug.yaml")


def debug(out: Path, *overrides: str) -> TrainConfig:
    return read_config(DEBUG, [f"out={out}", "data.workers=0", *overrides])


def losses(out: Path) -> list[tuple[float, ...]]:
    return [tuple(v for k, v in line.items() if k != "seconds") for line in read_log(out / "log.jsonl")]


@pytest.fixture(scope="module")
def unbroken(one_thread: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("unbroken")
    run(debug(out))
    return out


def test_a_run_leaves_what_it_should(unbroken: Path) -> None:
    lines = read_log(unbroken / "log.jsonl")
    assert [line["step"] for line in lines] == [5, 10, 15, 20]
    expected = {"pixel", "semantic", "codebook", "commitment", "entropy", "loss", "psnr", "lr", "usage_shared"}
    assert expected <= lines[0].keys()
    assert {"generator", "discriminator"} <= lines[-1].keys() - lines[0].keys()
    assert lines[-1]["pixel"] < lines[0]["pixel"]
    assert [step for step, _ in list_checkpoints(unbroken)] == [10, 20]
    assert {p.name for p in (unbroken / "samples").iterdir()} == {"step_000000010.png", "step_000000020.png"}
    assert list((unbroken / "tensorboard").iterdir())
    assert tmm.load(unbroken / "tokenizer").encode(torch.zeros(1, 3, 32, 32)).ids.shape == (1, 21)


def test_resuming_ends_with_the_same_weights(tmp_path: Path) -> None:
    whole, halves = tmp_path / "whole", tmp_path / "halves"
    run(debug(whole, "save_every=7", "optimizer.schedule=constant"))
    run(debug(halves, "steps=7", "save_every=7", "optimizer.schedule=constant", "log_every=1"))
    run(debug(halves, "save_every=7", "optimizer.schedule=constant", "log_every=1"))
    assert read_log(halves / "log.jsonl")[-1]["step"] == 20
    a, b = (torch.load(list_checkpoints(p)[-1][1] / "state.pt", weights_only=True) for p in (whole, halves))
    assert a["step"] == b["step"] == 20
    for part in ("tokenizer", "discriminator", "captions", "ema"):
        assert all(torch.equal(a[part][name], b[part][name]) for name in a[part]), part


def test_killed_at_a_random_step_and_resumed(unbroken: Path, tmp_path: Path) -> None:
    """SIGKILL, twice, wherever it is; the weights and the last losses are those of the run that was left alone."""
    rng = random.Random(time.time_ns())
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "train", DEBUG, f"out={tmp_path}", "data.workers=1", "save_every=5", "keep=1"]
    log = tmp_path / "log.jsonl"
    for target in sorted(rng.sample([5, 10, 15], 2)):
        process = subprocess.Popen(command, cwd=ROOT, env=environment, stderr=subprocess.PIPE)
        while process.poll() is None and not (log.exists() and f'"step": {target},' in log.read_text()):
            time.sleep(0.01)
        time.sleep(rng.uniform(0, 0.15))
        process.send_signal(signal.SIGKILL)
        process.communicate()
    subprocess.run(command, cwd=ROOT, env=environment, check=True, capture_output=True)
    assert len(list_checkpoints(tmp_path)) == 1
    a, b = (torch.load(list_checkpoints(p)[-1][1] / "state.pt", weights_only=True) for p in (unbroken, tmp_path))
    assert a["step"] == b["step"] == 20
    for part in ("tokenizer", "discriminator", "captions", "ema"):
        for name in a[part]:
            torch.testing.assert_close(a[part][name], b[part][name], rtol=0, atol=1e-6, msg=f"{part}.{name}")
    final, expected = read_log(log)[-1], read_log(unbroken / "log.jsonl")[-1]
    assert final["loss"] == pytest.approx(expected["loss"], abs=1e-6)


def test_accumulation_equals_a_large_batch(tmp_path: Path) -> None:
    """For the tokenizer and the discriminator alike (the caption term and batch norm, which mix samples, are off)."""
    off = [
        "loss.semantic=none",
        "loss.discriminator.norm=none",
        "loss.adaptive=false",
        "loss.gan_start=0",
        "scale_drop=0",
    ]
    off += ["loss.weights.entropy=0", "optimizer.lr=0.01", "upkeep.every=0"]
    images = torch.rand(8, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
    results = []
    for parts in (1, 4):
        state = build_state(debug(tmp_path, *off), Accelerator(cpu=True))
        batches = [Batch(part, [""] * len(part), []) for part in images.chunk(parts)]
        reports = [train_step(state, batches, 0.0) for _ in range(2)]
        results.append((reports[0]["grad_norm"], reports[0]["discriminator_grad_norm"], reports[0]["loss"]))
    assert results[0] == pytest.approx(results[1], rel=1e-4)


def test_every_key_of_a_configuration_is_read() -> None:
    """A key that nothing reads is an option nobody runs."""
    source = "\n".join(p.read_text() for folder in ("train", "tokenizers_mm") for p in (ROOT / folder).rglob("*.py"))
    config = (ROOT / "train" / "config.py").read_text() + (ROOT / "train" / "weights.py").read_text()
    import re

    for name in re.findall(r"^    (\w+): .* = .*$|^    (\w+): \w+$", config, re.M):
        key = next(filter(None, name))
        assert len(re.findall(rf"(\.|\"){key}\b", source)) >= 1, key


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("optimiser.lr=1", "config.optimiser: unknown key; did you mean 'optimizer'"),
        ("optimizer.lrr=1", "config.optimizer.lrr: unknown key; did you mean 'lr'"),
        ("model.family=nothing", "config.model.family: expected one of"),
        ("model.config.scale=3", "config.model.config.scale: unknown key; did you mean 'scales'"),
        ("steps=many", "config.steps: expected int, got many"),
        ("steps=0", "config.steps: expected at least 1, got 0"),
        ("loss.gan=wasserstein", r"config.loss.gan: expected one of \['hinge', 'non_saturating'\]"),
        ("steps", "override: expected key=value, got steps"),
        ("loss.semantic=teacher", "config.loss.teacher: expected a teacher"),
    ],
)
def test_bad_configurations_get_one_sentence(override: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read_config(DEBUG, [override])


def test_missing_perceptual_weights_are_an_error_before_any_work(tmp_path: Path) -> None:
    config = debug(tmp_path, "loss.weights.perceptual=1", f"loss.lpips_weights={tmp_path / 'vgg.pth'}")
    with pytest.raises(ValueError, match="perceptual weights: expected the VGG16 weights"):
        run(config)
    assert not list(tmp_path.iterdir())


def test_gradients_that_are_not_finite_stop_the_run(tmp_path: Path) -> None:
    state = build_state(debug(tmp_path), Accelerator(cpu=True))
    with torch.no_grad():
        next(state.tokenizer.parameters()).fill_(torch.inf)
    with pytest.raises((FloatingPointError, ValueError)):
        train_step(state, [Batch(torch.zeros(2, 3, 32, 32), ["", ""], [])], 0.0)


def test_a_teacher_and_trainable_prefixes(tmp_path: Path) -> None:
    teacher = {"name": "vit_tiny_patch16_224", "pretrained": False}
    teacher["options"] = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 1, "num_heads": 3}
    path = tmp_path / "teacher.json"
    path.write_text(json.dumps(teacher))
    config = debug(
        tmp_path / "run",
        "loss.semantic=teacher",
        f"loss.teacher={json.dumps(teacher)}",
        "trainable=[pixel_decoder., semantic_decoder.]",
        "steps=3",
        "loss.weights.codebook=0",
        "loss.weights.commitment=0",
        "loss.weights.entropy=0",
        "upkeep.every=0",
        "ema=0",
    )
    state = run(config)
    assert read_log(tmp_path / "run" / "log.jsonl")[-1]["semantic"] > 0
    fresh = build_state(config, Accelerator(cpu=True)).tokenizer.state_dict()
    for name, tensor in state.tokenizer.state_dict().items():
        moved = not torch.equal(tensor, fresh[name])
        assert moved == name.startswith(("pixel_decoder.", "semantic_decoder.")) or not tensor.is_floating_point(), name


def test_two_ranks_learn_as_one_with_a_batch_of_both(tmp_path: Path) -> None:
    """Two processes of 4 samples and one of 8 see the same samples; counts of codes are of both."""
    off = ["loss.semantic=none", "loss.weights.generator=0", "scale_drop=0", "loss.weights.entropy=0", "data.workers=0"]
    off += ["upkeep.every=0", "accumulate=1", "steps=4", "log_every=1", "save_every=4", "optimizer.clip=100"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "-m", "train"]
    two, one = tmp_path / "two", tmp_path / "one"
    command = [*launch, DEBUG, *off, f"out={two}", "batch_size=4"]
    subprocess.run(command, cwd=ROOT, env=environment, check=True, capture_output=True)
    run(debug(one, *off, "batch_size=8"))
    a, b = read_log(one / "log.jsonl"), read_log(two / "log.jsonl")
    assert [line["usage_shared"] for line in a[:2]] == [line["usage_shared"] for line in b[:2]]
    for x, y in zip(a, b, strict=True):
        assert x["grad_norm"] == pytest.approx(y["grad_norm"], rel=1e-3)


def test_bf16_autocast_trains(tmp_path: Path) -> None:
    """Networks in bfloat16; weights, codes and the reported losses stay in float32 and near those of a float32 run."""
    losses = {}
    for precision in ("fp32", "bf16"):
        AcceleratorState._reset_state(True)  # it allows one precision per process
        state = run(debug(tmp_path / precision, f"precision={precision}", "steps=4", "log_every=4"))
        assert {p.dtype for p in state.tokenizer.parameters()} == {torch.float32}
        losses[precision] = read_log(tmp_path / precision / "log.jsonl")[-1]
    AcceleratorState._reset_state(True)
    assert losses["bf16"]["pixel"] != losses["fp32"]["pixel"]
    assert losses["bf16"]["pixel"] == pytest.approx(losses["fp32"]["pixel"], rel=0.05)
