"""Trackers beside log.jsonl: numbers by step, sample images, and one run there however often it is resumed here.

TensorBoard is read back; stand-ins take the place of the clients of Weights & Biases and trackio below accelerate.
"""

import importlib.machinery
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import accelerate.tracking
import numpy as np
import pytest
from accelerate.state import AcceleratorState
from accelerate.utils import LoggerType
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tests.train.kinds import tiny
from train.distributed import make_accelerator
from train.log import read_log
from train.loop import run

pytestmark = pytest.mark.usefixtures("one_thread")
CLIENTS = [name for name in ("wandb", "trackio") if name in LoggerType.list()]


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    yield
    AcceleratorState._reset_state(True)


class Client(types.ModuleType):
    """A tracking service that keeps what it is given: options of every start, configurations, values by step."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.__spec__ = importlib.machinery.ModuleSpec(name, None)
        self.starts: list[dict[str, Any]] = []
        self.logged: list[tuple[int, dict[str, Any]]] = []
        self.settings: dict[str, Any] = {}
        self.config = types.SimpleNamespace(update=lambda values, allow_val_change: self.settings.update(values))
        self.finished = 0

    def init(self, **options: Any) -> "Client":
        self.starts.append(options)
        return self

    def Image(self, pixels: np.ndarray) -> np.ndarray:  # noqa: N802 (the name of both clients)
        return pixels

    def log(self, values: dict[str, Any], step: int) -> None:
        self.logged.append((step, values))

    def finish(self) -> None:
        self.finished += 1


def test_one_run_with_the_numbers_and_images_of_the_log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clients = {name: Client(name) for name in CLIENTS}
    for name, client in clients.items():
        monkeypatch.setitem(sys.modules, name, client)
    here = [LoggerType.TENSORBOARD, *map(LoggerType, CLIENTS)]
    monkeypatch.setattr(accelerate.tracking, "_available_trackers", here)
    edits = {"trackers": ["tensorboard", *CLIENTS], "save_every": 2, "sample_every": 2, "validate_every": 2}
    edits |= {"log_every": 1, "objective.validation": {"images": 2}, "objective.loss.gan_start": 0}
    for steps in (2, 4):
        run(tiny("reconstruction", Path(), tmp_path / "a run", {**edits, "steps": steps}))
        AcceleratorState._reset_state(True)
    numbers = [
        (line.pop("step"), {name: value for name, value in line.items() if isinstance(value, (int, float))})
        for line in read_log(tmp_path / "a run" / "log.jsonl")
    ]
    assert [step for step, _ in numbers] == [1, 2, 2, 3, 4, 4]
    for name, client in clients.items():
        first, second = client.starts
        assert first["project"] == "a run"
        which = {"wandb": "id", "trackio": "name"}[name]
        assert first[which] == second[which] != ""
        assert {start["resume"] for start in client.starts} == {"allow"}
        assert client.settings["objective.optimizer.lr"] == 0.001
        assert client.finished == 2
        assert [(step, values) for step, values in client.logged if "samples" not in values] == numbers
        grids = [(step, values["samples"]) for step, values in client.logged if "samples" in values]
        assert [step for step, _ in grids] == [2, 4]
        for step, grid in grids:
            with Image.open(tmp_path / "a run" / "samples" / f"step_{step:09d}.png") as image:
                assert np.array_equal(np.squeeze(np.asarray(grid)), np.asarray(image.convert("RGB")))
    board = EventAccumulator(str(tmp_path / "a run" / "trackers" / "a run"))
    board.Reload()
    for name in ("loss", "psnr", "validation_psnr"):
        expected = [(step, pytest.approx(values[name], rel=1e-6)) for step, values in numbers if name in values]
        assert [(event.step, event.value) for event in board.Scalars(name)] == expected
    assert [event.step for event in board.Images("samples")] == [2, 4]


def test_a_tracker_that_accelerate_does_not_find_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb", Client("wandb"))
    monkeypatch.setattr(accelerate.tracking, "_available_trackers", [LoggerType.TENSORBOARD])
    with pytest.raises(ValueError, match=r"config\.trackers: expected trackers that accelerate finds, got \['wandb'\]"):
        make_accelerator(tiny("reconstruction", Path(), tmp_path, {"trackers": ["wandb", "tensorboard"]}))
