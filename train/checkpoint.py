"""Checkpoints of a run: whole or not there, the newest few kept, read without unpickling code."""

import re
import shutil
from collections.abc import Collection
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, Protocol

import torch
from accelerate import Accelerator

from tokenizers_mm._files import atomic_directory, write_json
from tokenizers_mm.config import to_mapping
from tokenizers_mm.models.loading import read_json


class Run(Protocol):
    """What a checkpoint, a log and a loop know of the state of a run."""

    step: int
    seconds: float

    @property
    def config(self) -> Any:
        """With out, keep, steps, max_seconds and log_every."""
        ...

    @property
    def accelerator(self) -> Accelerator:
        """Of this process."""
        ...

    def parts(self) -> dict[str, Any]:
        """All things with a state_dict, by name."""
        ...

    def values(self) -> dict[str, Any]:
        """All else that changes, as numbers and tensors."""
        ...

    def set_values(self, values: dict[str, Any]) -> None:
        """Put them back."""


_NAME = re.compile(r"step_(\d{9})$")


def save_checkpoint(state: Run) -> None:
    """Write `out/checkpoints/step_N`, then delete the oldest beyond `keep`. Called on every rank; rank 0 writes.

    Those of later steps, which a run left that was started anew with resume: never, go too.
    """
    state.accelerator.wait_for_everyone()
    if not state.accelerator.is_main_process:
        return
    folder = Path(state.config.out) / "checkpoints"
    with atomic_directory(folder / f"step_{state.step:09d}") as temporary:
        torch.save(_collect(state), temporary / "state.pt")
        write_json(temporary / "config.json", to_mapping(state.config))
    found = list_checkpoints(state.config.out)
    ahead = [path for step, path in found if step > state.step]
    own = [path for step, path in found if step <= state.step]
    for path in ahead + own[: -state.config.keep]:
        shutil.rmtree(path)


def list_checkpoints(out: str | Path) -> list[tuple[int, Path]]:
    """(step, folder) of all whole checkpoints of a run, oldest first."""
    folder = Path(out) / "checkpoints"
    found = [(int(match[1]), path) for path in folder.glob("step_*") if (match := _NAME.search(path.name))]
    return sorted(found)


def resume(state: Run, may_change: Collection[str] | None = None) -> bool:
    """Take up the newest checkpoint of the run, if there is one.

    may_change: keys of the configuration that need not be what they were; None: all may change, where the parts agree.
    """
    checkpoints = list_checkpoints(state.config.out)
    if not checkpoints:
        return False
    folder = checkpoints[-1][1]
    if may_change is not None:
        _check_config(state, folder, may_change)
    path = folder / "state.pt"
    try:
        data = torch.load(path, map_location="cpu", weights_only=True)
    except (RuntimeError, EOFError, OSError, UnpicklingError) as error:
        why = f"{type(error).__name__}: {error}".splitlines()[0]
        raise ValueError(f"{path}: expected a whole checkpoint, got {why}") from None
    _restore(state, data)
    return True


def _check_config(state: Run, folder: Path, may_change: Collection[str]) -> None:
    before, now = read_json(folder / "config.json"), to_mapping(state.config)
    other = sorted(key for key in before.keys() | now.keys() if before.get(key) != now.get(key))
    other = [key for key in other if key not in may_change]
    if other:
        raise ValueError(f"{folder}: expected the configuration of this run (or resume=never), got another {other[0]}")


def _collect(state: Run) -> dict[str, Any]:
    kept = {"step": state.step, "seconds": state.seconds, **state.values()}
    return kept | {name: thing.state_dict() for name, thing in state.parts().items()}


def _restore(state: Run, data: Any) -> None:
    parts = state.parts()
    expected = {"step", "seconds", *state.values(), *parts}
    if not isinstance(data, dict) or data.keys() != expected:
        got = f"a difference in {sorted(map(str, data.keys() ^ expected))}" if isinstance(data, dict) else "no mapping"
        raise ValueError(f"checkpoint: expected the parts of this configuration, got {got}")
    for name, thing in parts.items():
        try:
            thing.load_state_dict(data[name])
        except (RuntimeError, ValueError) as error:
            why = str(error).splitlines()[0]
            raise ValueError(f"checkpoint: expected {name} of this configuration, got {why}") from None
    state.step, state.seconds = data["step"], data["seconds"]
    state.set_values({name: data[name] for name in state.values()})
