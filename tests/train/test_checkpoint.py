"""The files of checkpoints, which every program shares."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from accelerate import Accelerator
from torch import equal, nn

from train.checkpoint import list_checkpoints, resume, save_checkpoint
from train.config import ModelConfig, TrainConfig


@dataclass
class SmallRun:
    """A layer that learns, and a number."""

    config: TrainConfig
    accelerator: Accelerator = field(default_factory=lambda: Accelerator(cpu=True))
    layer: nn.Module = field(default_factory=lambda: nn.Linear(2, 2))
    name: str = "number"
    number: int = 0
    step: int = 0
    seconds: float = 0.0

    def parts(self) -> dict[str, Any]:
        return {"layer": self.layer}

    def values(self) -> dict[str, Any]:
        return {self.name: self.number}

    def set_values(self, values: dict[str, Any]) -> None:
        self.number = values[self.name]


def test_the_newest_few_are_kept_and_later_steps_of_an_older_run_go(tmp_path: Path) -> None:
    state = SmallRun(TrainConfig(str(tmp_path), ModelConfig("tokenflow"), keep=2))
    assert not resume(state)
    for state.step in (10, 20, 30):
        save_checkpoint(state)
    assert [step for step, _ in list_checkpoints(tmp_path)] == [20, 30]
    state.step = 25
    save_checkpoint(state)
    assert [step for step, _ in list_checkpoints(tmp_path)] == [20, 25]
    assert (list_checkpoints(tmp_path)[0][1] / "config.json").is_file()


def test_a_damaged_or_foreign_checkpoint_is_refused(tmp_path: Path) -> None:
    config = TrainConfig(str(tmp_path), ModelConfig("tokenflow"))
    state, other = SmallRun(config, step=3, seconds=1.5, number=7), SmallRun(config)
    save_checkpoint(state)
    assert resume(other)
    assert equal(other.layer.weight, state.layer.weight)  # type: ignore[arg-type]
    assert (other.step, other.seconds, other.number) == (3, 1.5, 7)
    with pytest.raises(ValueError, match=r"expected the parts of this configuration, got a difference in \['n', 'num"):
        resume(SmallRun(config, name="n"))
    with pytest.raises(ValueError, match="expected layer of this configuration, got"):
        resume(SmallRun(config, layer=nn.Linear(3, 2)))
    path = list_checkpoints(tmp_path)[0][1] / "state.pt"
    for damaged in (b"", b"PK", b"\x80\x02cposix\nsystem\n.", b"no pickle at all", path.read_bytes()[:-50]):
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match=r"state.pt: expected a whole checkpoint, got \w+Error: ") as caught:
            resume(other)
        assert "\n" not in str(caught.value)
