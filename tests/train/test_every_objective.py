"""One trainer: everything here holds for every kind of objective."""

import os
import random
import shutil
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from accelerate.state import AcceleratorState

import train.loop
from tests.train.kinds import (
    KINDS,
    SMALLER,
    assert_same,
    edited,
    final,
    make_place,
    plain,
    run_ranks,
    same_on_all_ranks,
    start,
    tiny,
    without_dropout,
)
from tokenizers_mm.data.scenes import make_scene
from train.checkpoint import list_checkpoints
from train.config import parse_config
from train.log import read_log
from train.loop import run


@pytest.fixture(scope="module")
def place(one_thread: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_place(tmp_path_factory.mktemp("place"))


@pytest.fixture(autouse=True)
def _one_precision(one_thread: None) -> Iterator[None]:
    yield
    AcceleratorState._reset_state(True)


@pytest.fixture(scope="module")
def unbroken(place: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Runs that were left alone, by kind."""
    found: dict[str, Path] = {}

    def get(kind: str) -> Path:
        if kind not in found:
            found[kind] = tmp_path_factory.mktemp(f"unbroken_{kind}")
            run(tiny(kind, place, found[kind]))
        return found[kind]

    return get


def lines(out: Path) -> list[dict[str, Any]]:
    untimed = ("seconds", "data_wait")
    return [{k: v for k, v in line.items() if k not in untimed} for line in read_log(out / "log.jsonl")]


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_learns_and_leaves_its_files(kind: str, place: Path, unbroken: Any) -> None:
    out = unbroken(kind)
    steps = [line["step"] for line in read_log(out / "log.jsonl") if "loss" in line]
    assert steps == list(range(1, 9))
    assert [step for step, _ in list_checkpoints(out)] == [6, 8]
    assert {"log.jsonl", "checkpoints"} <= {path.name for path in out.iterdir()}
    assert ((out / "tokenizer").is_dir(), (out / "model.safetensors").is_file()) == {
        "reconstruction": (True, False),
        "mar": (True, False),
        "language": (False, True),
        "joint": (True, True),
    }[kind]
    contents = final(out)
    assert contents["counters"]["samples"] == 8 * 4
    assert contents["counters"]["step"] == 8


@pytest.mark.parametrize("kind", KINDS)
def test_stopped_anywhere_and_resumed_is_unbroken(
    kind: str, place: Path, unbroken: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bit for bit, dropout on: weights, averages, moments, counts, and the log."""
    whole = train.loop.train_step
    for cut in (1, 4, 7):

        def step(state: Any, batches: Any, until: int = cut) -> Any:
            if state.step == until:
                raise KeyboardInterrupt
            return whole(state, batches)

        monkeypatch.setattr(train.loop, "train_step", step)
        with pytest.raises(KeyboardInterrupt):
            run(tiny(kind, place, tmp_path, {"save_every": 1}))
        assert list_checkpoints(tmp_path)[-1][0] == cut
    monkeypatch.setattr(train.loop, "train_step", whole)
    run(tiny(kind, place, tmp_path, {"save_every": 1}))
    assert_same(final(unbroken(kind)), final(tmp_path))
    assert lines(unbroken(kind)) == lines(tmp_path)


@pytest.mark.parametrize("kind", KINDS)
def test_killed_at_random_and_resumed_is_unbroken(kind: str, place: Path, unbroken: Any, tmp_path: Path) -> None:
    """SIGKILL, twice, wherever it is; also while a checkpoint is written or rotated."""
    rng = random.Random(time.time_ns())
    data = plain(kind, place, tmp_path / "run", {"save_every": 1})
    log = tmp_path / "run" / "log.jsonl"
    for target in sorted(rng.sample(range(1, 7), 2)):
        process = start(data, tmp_path / "run.yaml")
        while process.is_alive() and not (log.exists() and f'"step": {target},' in log.read_text()):
            time.sleep(0.005)
        time.sleep(rng.uniform(0, 0.2))
        process.kill()
        process.join()
    process = start(data, tmp_path / "run.yaml")
    process.join()
    assert process.exitcode == 0, (tmp_path / "run.yaml.stderr").read_text()
    assert_same(final(unbroken(kind)), final(tmp_path / "run"))
    assert lines(unbroken(kind)) == lines(tmp_path / "run")


FAULTS = {
    "tensors of a checkpoint are written": ("train.checkpoint.save_tensors", 3),
    "hashes of a checkpoint are taken": ("train.checkpoint.sha256", 8),
    "a checkpoint is about to be rotated": ("train.checkpoint.list_checkpoints", 4),
    "a checkpoint is moved away to be deleted": ("os.replace", 4),
    "a network has stepped and its discriminator has not": ("train.step.descend", 9),
    "a step is over and nothing is saved": ("train.loop.train_step", 5),
}
"""Places of a kill: the function and the number of the call that does not return."""


@pytest.mark.parametrize("fault", FAULTS)
def test_killed_while(fault: str, place: Path, unbroken: Any, tmp_path: Path) -> None:
    data = plain("reconstruction", place, tmp_path / "run", {"save_every": 1})
    process = start(data, tmp_path / "run.yaml", kill_at=FAULTS[fault])
    process.join()
    assert process.exitcode == -9, (tmp_path / "run.yaml.stderr").read_text()
    run(parse_config(data))
    assert_same(final(unbroken("reconstruction")), final(tmp_path / "run"))
    assert lines(unbroken("reconstruction")) == lines(tmp_path / "run")
    assert not [path for path in (tmp_path / "run" / "checkpoints").iterdir() if path.name.startswith(".")]


def test_a_killed_worker_ends_the_run_and_the_next_start_goes_on(place: Path, unbroken: Any, tmp_path: Path) -> None:
    data = plain("reconstruction", place, tmp_path / "run", {"save_every": 1, "objective.data.workers": 1})
    log = tmp_path / "run" / "log.jsonl"
    process = start(data, tmp_path / "run.yaml")
    while process.is_alive() and not (log.exists() and '"step": 2,' in log.read_text()):
        time.sleep(0.005)
    for worker in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split():
        os.kill(int(worker), signal.SIGKILL)
    process.join()
    message = (tmp_path / "run.yaml.stderr").read_text()
    assert process.exitcode == 2
    assert "workers: expected processes that live to the end" in message
    run(parse_config(data))
    assert_same(final(unbroken("reconstruction")), final(tmp_path / "run"))
    assert lines(unbroken("reconstruction")) == lines(tmp_path / "run")


@pytest.mark.parametrize(("kind", "number"), [("reconstruction", 2), ("mar", 15), ("language", 15), ("joint", 2)])
def test_a_signal_ends_with_a_checkpoint_and_its_code(
    kind: str, number: int, place: Path, unbroken: Any, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    data = plain(kind, place, out, {"save_every": 0})
    process = start(data, tmp_path / "run.yaml")
    while (process.is_alive() and not (out / "log.jsonl").exists()) or not (out / "log.jsonl").read_text():
        time.sleep(0.005)
    os.kill(process.pid, number)
    process.join()
    message = (tmp_path / "run.yaml.stderr").read_text()
    assert process.exitcode == 128 + number, message
    assert "Traceback" not in message
    assert f"stopped by signal {number} after step" in message
    assert len(list_checkpoints(out)) == 1
    run(parse_config(edited(data, {"save_every": 2})))
    assert_same(final(unbroken(kind)), final(out))


ENGINES = [(kind, engine) for kind in KINDS for engine in ("ddp", "fsdp") if (kind, engine) != ("joint", "fsdp")]
"""Joint tuning is refused under fsdp: its guard takes whole networks back."""


@pytest.fixture(scope="module")
def large_batch(place: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Runs of 20 steps of one process with 6 samples a step, by kind."""
    found: dict[str, Path] = {}

    def get(kind: str) -> Path:
        if kind not in found:
            found[kind] = tmp_path_factory.mktemp(f"large_{kind}")
            run(tiny(kind, place, found[kind], {**twenty(kind), "batch_size": 6}))
        return found[kind]

    return get


def twenty(kind: str) -> dict[str, Any]:
    """Edits for 20 steps without what mixes the samples of a batch, with checkpoints of the last two tens."""
    edits = without_dropout(kind) | {"save_every": 10, "keep": 2}
    if kind == "joint":
        stages = zip(SMALLER["joint"]["objective.stages"], (4, 12, 4), strict=True)
        slow = {"lr": 0.00002}  # of the tokenizer: a code that flips moves the loss by a jump
        edits["objective.stages"] = [
            {**stage, "steps": steps} | ({"tokenizer": slow} if "tokenizer" in stage else {}) for stage, steps in stages
        ]
        return edits
    if kind == "reconstruction":  # a code that float32 flips moves the loss by a jump, a revived one by more
        edits |= {"objective.optimizer.lr": 0.00005, "objective.revival.every": 0}
    return edits | {"steps": 20}


@pytest.mark.parametrize("kind", KINDS)
def test_micro_batches_learn_as_one_large_batch(kind: str, place: Path, large_batch: Any, tmp_path: Path) -> None:
    run(tiny(kind, place, tmp_path, {**twenty(kind), "batch_size": 2, "accumulate": 3}))
    assert_learned_alike(large_batch(kind), tmp_path)


@pytest.mark.parametrize(("kind", "engine"), ENGINES)
def test_two_processes_learn_as_one(kind: str, engine: str, place: Path, large_batch: Any, tmp_path: Path) -> None:
    """Two processes of 3 samples and one of 6, for 20 steps; one, or three, go on from the checkpoint of two."""
    data = plain(kind, place, tmp_path / "two", {**twenty(kind), "batch_size": 3, "engine": engine})
    assert run_ranks(data, tmp_path / "two.yaml", 2) == [0, 0], (tmp_path / "0_two.yaml.stderr").read_text()
    assert_learned_alike(large_batch(kind), tmp_path / "two")
    share = float((tmp_path / "0_two.yaml.share").read_text())
    assert (0.4 < share < 0.75) if engine == "fsdp" else share == 1.0
    shutil.rmtree(list_checkpoints(tmp_path / "two")[-1][1])  # as if it had been killed at step 10
    shutil.copytree(tmp_path / "two", tmp_path / "three")
    run(parse_config(data | {"batch_size": 6}))
    assert_learned_alike(large_batch(kind), tmp_path / "two")
    if kind == "language":  # the quickest
        more = data | {"batch_size": 2, "out": str(tmp_path / "three")}
        assert run_ranks(more, tmp_path / "three.yaml", 3) == [0] * 3, (tmp_path / "0_three.yaml.stderr").read_text()
        assert_learned_alike(large_batch(kind), tmp_path / "three")


def assert_learned_alike(one: Path, other: Path) -> None:
    for a, b in zip(lines(one), lines(other), strict=True):
        assert a.keys() == b.keys()
        for name in a:
            if isinstance(a[name], float):
                close = b[name] == pytest.approx(a[name], rel=2e-3, abs=1e-5)
                assert close, (a["step"], name, a[name], b[name])
    # Adam divides by the size of the gradient: rounding moves a weight whose gradient is nothing but rounding
    a, b = final(one), final(other)
    assert a["counters"].items() >= {"step": 20, "samples": 120}.items()
    for name in a:
        if name.startswith(("network", "average")):
            assert_same(a[name], b[name], 2e-4, name)


WARM: dict[str, Any] = {
    "objective.warm_start": {"images": 24, "iterations": 2},
    "objective.model.config.quantizer.dims": [16, 16],
    "objective.model.config.pixel_encoder.linear": "alone",
    "objective.model.config.pixel_decoder.linear": True,
}
"""Edits for a start from principal components and k-means."""


SHARDED = {"engine": "fsdp", "gradient_checkpointing": True, "validate_every": 4, "best": "psnr", "sample_every": 4}

ALL_ON = [*((kind, {}) for kind in KINDS), ("reconstruction", WARM), ("reconstruction", SHARDED)]


@pytest.mark.parametrize(("kind", "edits"), ALL_ON)
def test_two_ranks_end_with_the_same_bits(kind: str, edits: dict[str, Any], place: Path, tmp_path: Path) -> None:
    """With everything on: dropout, revival, the discriminator, accumulation, one rank's unreadable image.

    Seven images, one of them unreadable, and four samples a step: no pass ends with a step.
    """
    edits = {"batch_size": 2, "accumulate": 2, **edits}
    if kind == "reconstruction":
        for index in range(7):
            make_scene(index).render(40).save(tmp_path / f"{index}.png")
            (tmp_path / f"{index}.txt").write_text(make_scene(index).caption)
        (tmp_path / "3.png").write_bytes(b"no image")
        edits |= {"objective.data.sources": [{"kind": "folder", "path": str(tmp_path)}]}
    assert same_on_all_ranks(plain(kind, place, tmp_path / "run", edits), tmp_path / "run.yaml", 2)
    if kind == "reconstruction":
        log = read_log(tmp_path / "run" / "log.jsonl")
        assert sum(line.get("skipped", 0) for line in log) > 0
        assert sum(line.get("revived", 0) for line in log) > 0
    if "best" in edits:
        assert {"samples", "best"} <= {path.name for path in (tmp_path / "run").iterdir()}
