"""The files of checkpoints, which every program shares."""

from pathlib import Path

import pytest
import torch
from torch import nn

from train.checkpoint import list_checkpoints, read_newest, restore_parts, write_checkpoint
from train.config import OptimizerConfig


def test_the_newest_few_are_kept_and_later_steps_of_an_older_run_go(tmp_path: Path) -> None:
    assert read_newest(tmp_path) is None
    for step in (10, 20, 30):
        write_checkpoint(tmp_path, step, {"step": step}, OptimizerConfig(), keep=2)
    assert [step for step, _ in list_checkpoints(tmp_path)] == [20, 30]
    assert read_newest(tmp_path) == {"step": 30}
    write_checkpoint(tmp_path, 25, {"step": 25}, OptimizerConfig(), keep=2)
    assert [step for step, _ in list_checkpoints(tmp_path)] == [20, 25]
    assert (list_checkpoints(tmp_path)[0][1] / "config.json").is_file()


def test_a_damaged_or_foreign_checkpoint_is_refused(tmp_path: Path) -> None:
    layer = nn.Linear(2, 2)
    write_checkpoint(tmp_path, 1, {"layer": layer.state_dict(), "step": 1}, OptimizerConfig(), keep=1)
    data = read_newest(tmp_path)
    assert data is not None
    other = nn.Linear(2, 2)
    restore_parts({"layer": other}, data, ("step",))
    assert torch.equal(other.weight, layer.weight)
    with pytest.raises(ValueError, match=r"expected the parts of this configuration, got a difference in \['step'\]"):
        restore_parts({"layer": other}, data, ())
    with pytest.raises(ValueError, match="expected layer of this configuration, got"):
        restore_parts({"layer": nn.Linear(3, 2)}, data, ("step",))
    (list_checkpoints(tmp_path)[0][1] / "state.pt").write_bytes(b"PK")
    with pytest.raises(ValueError, match="expected a whole checkpoint, got"):
        read_newest(tmp_path)
