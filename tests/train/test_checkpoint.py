"""Files of checkpoints, the lock of a run's folder, and configurations that changed between two starts."""

import hashlib
import itertools
import json
import os
import pickle
import signal
import time
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import torch

import train.loop
from tests.models.test_saving import fork
from tests.train.kinds import assert_same, final, make_place, plain, start, tiny
from tokenizers_mm._files import one_writer
from tokenizers_mm.data.scenes import make_scene
from train.__main__ import main
from train.checkpoint import HASHES, STATE, TENSORS, Checkpoints, list_checkpoints, read_checkpoint, resume
from train.config import RunConfig, parse_config
from train.log import _forget_after, read_log
from train.loop import run
from train.signals import Signals
from train.state import COUNTERS, State, build_state

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_place(tmp_path_factory.mktemp("place"))


def config(place: Path, out: Path, edits: dict[str, Any] | None = None) -> RunConfig:
    return tiny("reconstruction", place, out, {"steps": 4, "save_every": 2, **(edits or {})})


def save_checkpoint(state: State) -> None:
    """Save the checkpoint of a step, and wait until it is written."""
    with closing(Checkpoints()) as checkpoints:
        checkpoints.save(state)
        checkpoints.finish()


@pytest.fixture
def state(place: Path, tmp_path: Path) -> State:
    return build_state(config(place, tmp_path))


def test_the_newest_few_are_kept_and_later_steps_of_an_older_run_go(state: State, tmp_path: Path) -> None:
    assert not resume(state)
    for state.step in (10, 20, 30):
        save_checkpoint(state)
    assert [step for step, _ in list_checkpoints(tmp_path)] == [20, 30]
    state.step = 25
    save_checkpoint(state)
    save_checkpoint(state)  # over itself
    assert [step for step, _ in list_checkpoints(tmp_path)] == [20, 25]
    assert {path.name for path in (tmp_path / "checkpoints").iterdir()} == {"step_000000020", "step_000000025"}


def damages() -> dict[str, Any]:
    def flip(path: Path) -> None:
        data = bytearray(path.read_bytes())
        data[len(data) // 2] ^= 1
        path.write_bytes(data)

    return {
        "truncated": lambda folder: os.truncate(folder / TENSORS, 1000),
        "empty": lambda folder: (folder / TENSORS).write_bytes(b""),
        "a flipped bit in tensors": lambda folder: flip(folder / TENSORS),
        "a flipped bit in the rest": lambda folder: flip(folder / STATE),
        "a flipped bit in the hashes": lambda folder: flip(folder / "sha256.json"),
        "a flipped bit in the configuration": lambda folder: flip(folder / "config.json"),
        "a file that is gone": lambda folder: (folder / STATE).unlink(),
        "a pickle": lambda folder: torch.save({"a": 1}, folder / TENSORS),
    }


@pytest.mark.parametrize("damage", damages())
def test_a_damaged_checkpoint_is_passed_over_with_a_sentence(
    damage: str, state: State, place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for state.step in (2, 4):
        save_checkpoint(state)
    newest = list_checkpoints(tmp_path)[-1][1]
    damages()[damage](newest)
    other = build_state(config(place, tmp_path))
    assert resume(other)
    assert other.step == 2
    error = capsys.readouterr().err
    assert "step_000000004" in error
    assert "continuing from step_000000002" in error
    damages()[damage](list_checkpoints(tmp_path)[0][1])
    with pytest.raises(ValueError, match=r"expected .*, got .* \(resume=never starts anew\)") as caught:
        resume(build_state(config(place, tmp_path)))
    assert "\n" not in str(caught.value)


def test_a_state_of_anybody_is_one_sentence(state: State, tmp_path: Path) -> None:
    """A checkpoint with hashes that fit, whose state is of another form: read, or refused with the folder's name."""
    save_checkpoint(state)
    (_, folder) = list_checkpoints(tmp_path)[-1]
    whole = json.loads((folder / STATE).read_text())
    texts = [
        "",
        "x",
        "[]",
        "3",
        "{}",
        "[" * 100_000,
        '{"tensor": "none"}',
        '{"map": [1]}',
        '{"map": [[[], {"value": 1}]]}',
    ]
    texts += [json.dumps({"map": [pair for pair in whole["map"] if pair != gone]}) for gone in whole["map"]]
    for text in texts:
        (folder / STATE).write_text(text)
        hashes = json.loads((folder / HASHES).read_text()) | {STATE: hashlib.sha256(text.encode()).hexdigest()}
        (folder / HASHES).write_text(json.dumps(hashes))
        try:
            resume(state)
        except ValueError as error:
            refused = str(error)
        else:
            continue
        assert refused.startswith(("checkpoint: ", str(folder))), (text[:80], refused)
        assert "expected" in refused


def test_counters_of_anybody_are_one_sentence(state: State, tmp_path: Path) -> None:
    """A counter that no run can have would end a later step, or change the order of the samples."""
    save_checkpoint(state)
    data = read_checkpoint(list_checkpoints(tmp_path)[-1][1])
    seconds = ("1.5", repr(10**30))
    sound = {"best": ("None", "-1", *seconds), "seconds": seconds, "stage_seconds": seconds}
    sound |= {"reported": ("{}",), "skipped": ("{}",)}
    for name in (*COUNTERS, "skipped"):
        for value in (None, "x", -1, 1.5, True, float("nan"), float("inf"), 10**30, [1], {}):
            given = {**data, "counters": {**data["counters"], name: value}}
            if repr(value) in sound.get(name, ()):
                state.load_state_dict(given)
                continue
            with pytest.raises(ValueError, match=f"checkpoint: {name}: expected "):
                state.load_state_dict(given)


def test_files_of_other_programs_in_the_folder_of_checkpoints_stay(state: State, tmp_path: Path) -> None:
    """Such as those of a file manager, and of a network file system that waits for a reader."""
    save_checkpoint(state)
    others = {tmp_path / "checkpoints" / name for name in (".DS_Store", ".nfs0001", ".git", "notes.txt")}
    for path in others:
        path.mkdir() if path.name == ".git" else path.write_text("mine")
    state.step = 2
    save_checkpoint(state)
    assert resume(state)
    assert all(path.exists() for path in others)


def test_a_kill_between_two_moves_loses_no_checkpoint(state: State, tmp_path: Path) -> None:
    """A checkpoint is saved over one of its own step, as after a stop: the old or the new one is found."""
    state.step = 2
    save_checkpoint(state)
    replace, codes = os.replace, []
    for moves in range(1, 8):
        child = fork()
        if child == 0:
            left = itertools.count(moves, -1)
            os.replace = lambda *given, left=left: replace(*given) if next(left) > 0 else os._exit(9)
            save_checkpoint(state)
            os._exit(0)
        codes.append(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
        state.step = 0
        assert resume(state)
        assert state.step == 2
        assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step_000000002"]
    assert codes[:2] == [9, 9]
    assert codes[-1] == 0


def test_nothing_is_left_of_a_write_that_failed(state: State, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a full disk: the checkpoint before stays, and is the newest."""
    state.step = 2
    save_checkpoint(state)

    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("train.checkpoint.save_tensors", full)
    state.step = 4
    with pytest.raises(ValueError, match=r"checkpoint of step 4: expected to be written, got OSError: .*No space left"):
        save_checkpoint(state)
    assert {path.name for path in (tmp_path / "checkpoints").iterdir()} == {"step_000000002"}
    assert read_checkpoint(list_checkpoints(tmp_path)[0][1])["counters"]["step"] == 2


def test_tensors_that_share_memory_and_all_kinds_of_values_come_back(state: State, tmp_path: Path) -> None:
    weight = torch.arange(6.0).view(2, 3)
    values = {
        "a": weight,
        "b": weight.T,
        3: [1, 2.5, None, True, "x", {"deep": torch.tensor(7)}],
        "many": list(range(200_000)),
    }
    state.objective.state_dict = lambda: values  # type: ignore[method-assign]
    save_checkpoint(state)
    found = final(tmp_path)["objective"]
    assert found.keys() == {"a", "b", 3, "many"}
    assert found["many"] == list(range(200_000))  # more values than a configuration may have
    assert torch.equal(found["a"], weight)
    assert torch.equal(found["b"], weight.T)
    assert found[3][:5] == [1, 2.5, None, True, "x"]
    assert int(found[3][5]["deep"]) == 7


def test_two_starts_in_one_folder(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The second is refused while the first lives; the lock of a process that was killed is taken over."""
    out = tmp_path / "run"
    data = plain("reconstruction", place, out, {"steps": 10000, "save_every": 0})
    process = start(data, tmp_path / "run.yaml")
    while process.is_alive() and not (out / "log.jsonl").exists():
        time.sleep(0.01)
    assert main([str(tmp_path / "run.yaml")]) == 2
    message = capsys.readouterr().err
    assert f"config.out: expected a folder that no other run writes to, got {out} (process {process.pid})" in message
    process.kill()
    process.join()
    run(parse_config(data | {"steps": 1}))
    with one_writer(out, "out"):
        pass


def test_a_second_signal_acts_at_once() -> None:
    with Signals() as signals:
        os.kill(os.getpid(), signal.SIGINT)
        assert signals.received == signal.SIGINT
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)


@pytest.mark.parametrize(
    ("edits", "changed"),
    [
        ({"objective.optimizer.betas": [0.5, 0.6]}, "objective.optimizer.betas"),
        ({"objective.optimizer.weight_decay": 0.3}, "objective.optimizer.weight_decay"),
        ({"objective.optimizer.lr": 0.02}, "objective.optimizer.lr"),
        ({"objective.loss.weights.pixel": 3.0}, "objective.loss.weights.pixel"),
        ({"objective.scale_drop": 1.0}, "objective.scale_drop"),
        ({"accumulate": 3}, "accumulate"),
    ],
)
def test_a_difference_of_the_configuration_is_applied(
    edits: dict[str, Any], changed: str, place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run(config(place, tmp_path / "a", {"steps": 2}))
    plainly = tmp_path / "plainly"
    run(config(place, plainly, {"steps": 2}))
    run(config(place, plainly, {"steps": 4}))
    capsys.readouterr()
    state = run(config(place, tmp_path / "a", {"steps": 4, **edits}))
    assert f"continuing with other values of {', '.join(sorted([changed, 'steps']))}" in capsys.readouterr().err
    one, other = final(plainly)["network tokenizer"], final(tmp_path / "a")["network tokenizer"]
    assert any(not torch.equal(one[name], other[name]) for name in one)
    group = state.optimizers["tokenizer"].param_groups[0]
    assert list(group["betas"]) == edits.get("objective.optimizer.betas", [0.9, 0.95])
    assert group["weight_decay"] == edits.get("objective.optimizer.weight_decay", 0.0)


@pytest.mark.parametrize(
    ("edits", "message"),
    [
        ({"seed": 1}, "config.seed: expected 0 as in"),
        ({"objective.data.sources": [{"kind": "scenes"}]}, "config.objective.data.sources: expected"),
        (
            {"objective.model.config.quantizer.codebook_size": 64},
            "config.objective.model.config.quantizer.codebook_size",
        ),
        (
            {"objective.loss.discriminator.channels": 8},
            "config.objective.loss.discriminator.channels: expected 16 as in",
        ),
        ({"ema": 0.0}, "checkpoint: expected the parts of this configuration, got a difference in"),
    ],
)
def test_a_difference_that_cannot_be_applied_is_refused_by_name(
    edits: dict[str, Any], message: str, place: Path, tmp_path: Path
) -> None:
    run(config(place, tmp_path, {"steps": 2}))
    with pytest.raises(ValueError) as caught:
        run(config(place, tmp_path, {"steps": 4, **edits}))
    assert message in str(caught.value)


def test_a_finished_run_refuses_what_it_can_no_longer_apply(place: Path, tmp_path: Path) -> None:
    run(config(place, tmp_path))
    before = final(tmp_path)["network tokenizer"]
    run(config(place, tmp_path, {"log_every": 3, "keep": 4}))
    with pytest.raises(ValueError, match=r"config.objective.optimizer.lr: expected 0.001, since this run is finished"):
        run(config(place, tmp_path, {"objective.optimizer.lr": 0.5}))
    assert all(torch.equal(tensor, before[name]) for name, tensor in final(tmp_path)["network tokenizer"].items())


def test_lines_of_a_log_that_are_none_are_dropped(tmp_path: Path) -> None:
    """A log that was cut off, or that holds what no run writes; in place of one, only a file is written to."""
    good = [b'{"step": 1, "loss": 2.0}', b'{"step": 2, "sign": "x"}']
    odd = [b'{"step": 2', b"5", b"null", b"[1]", b'{"step": "1"}', b'{"step": null}', b'{"loss": 1}', b"\xff\xfe"]
    odd += [b"[" * 100_000, b'{"step": 1e999}', b'{"step": true}', b"", b'{"step": 3}']
    path = tmp_path / "log.jsonl"
    path.write_bytes(b"\n".join([odd[0], good[0], *odd, good[1], *odd]))
    _forget_after(path, 2)
    assert path.read_bytes().splitlines() == good
    path.unlink()
    os.mkfifo(path)
    with pytest.raises(ValueError, match="expected a file or a new name, got a FIFO"):
        _forget_after(path, 2)


def test_a_run_started_anew_forgets_the_one_before(place: Path, tmp_path: Path) -> None:
    run(config(place, tmp_path))
    run(config(place, tmp_path, {"steps": 3, "resume": "never", "seed": 1}))
    assert [line["step"] for line in read_log(tmp_path / "log.jsonl")] == [1, 2, 3]
    assert [step for step, _ in list_checkpoints(tmp_path)] == [2, 3]


def test_a_line_of_the_log_and_a_grid_of_images_span_a_restart(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Means over steps before and after a checkpoint, and the same images in all grids, bit for bit."""
    images = tmp_path / "images"
    images.mkdir()
    (images / "broken.png").write_bytes(b"no image")
    for index in range(4):
        make_scene(index).render(40).save(images / f"{index}.png")
        (images / f"{index}.txt").write_text("a circle")
    edits = {"steps": 6, "save_every": 3, "log_every": 5, "sample_every": 2}
    edits |= {"objective.data.sources": [{"kind": "folder", "path": str(images)}, {"kind": "scenes"}]}
    run(config(place, tmp_path / "whole", edits))
    step = train.loop.train_step

    def broken(state: State, batches: Any) -> Any:
        if state.step == 4:
            raise KeyboardInterrupt
        return step(state, batches)

    monkeypatch.setattr(train.loop, "train_step", broken)
    with pytest.raises(KeyboardInterrupt):
        run(config(place, tmp_path / "broken", edits))
    monkeypatch.setattr(train.loop, "train_step", step)
    run(config(place, tmp_path / "broken", edits))
    one, other = (read_log(tmp_path / name / "log.jsonl") for name in ("whole", "broken"))
    assert [line["step"] for line in one] == [line["step"] for line in other] == [5, 6]
    assert one[0]["skipped"] > 1
    for a, b in zip(one, other, strict=True):
        assert {k: v for k, v in a.items() if k not in ("seconds", "data_wait")}.items() <= b.items()
    for path in (tmp_path / "whole" / "samples").iterdir():
        assert path.read_bytes() == (tmp_path / "broken" / "samples" / path.name).read_bytes()
    assert_same(final(tmp_path / "whole"), final(tmp_path / "broken"))


def test_another_batch_size_goes_on_at_the_next_sample(place: Path, tmp_path: Path) -> None:
    """Samples 0 to 7 in two steps of 4, then 8 to 11 in two steps of 2."""
    run(config(place, tmp_path, {"steps": 2}))
    state = build_state(config(place, tmp_path, {"batch_size": 2}))
    assert resume(state)
    assert state.samples == 8
    fresh = build_state(config(place, tmp_path / "fresh"))
    batches = fresh.objective.batches(0, 0)
    _, _, third = next(batches), next(batches), next(batches)
    halves = state.objective.batches(0, state.samples)
    assert torch.equal(torch.cat([next(halves).images, next(halves).images]), third.images)


def test_checkpoints_are_read_without_unpickling(state: State, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_checkpoint(state)

    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("unpickled")

    for name in ("load", "loads", "Unpickler"):
        monkeypatch.setattr(pickle, name, refuse)
    monkeypatch.setattr(torch, "load", refuse)
    assert final(tmp_path)["counters"]["step"] == 0
