"""Checkpoints of a run: whole or not there, the newest few kept, read without unpickling code.

What is in one is the business of the program; the files are the same for all.
"""

import re
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch

from tokenizers_mm._files import atomic_directory, write_json
from tokenizers_mm.config import to_mapping

from .state import TrainState

_NAME = re.compile(r"step_(\d{9})$")


def save_checkpoint(state: TrainState) -> None:
    """Write `out/checkpoints/step_N`, then delete the oldest beyond `keep`. Called on every rank; rank 0 writes."""
    state.accelerator.wait_for_everyone()
    if not state.accelerator.is_main_process:
        return
    write_checkpoint(state.config.out, state.step, _collect(state), state.config, state.config.keep)


def write_checkpoint(out: str | Path, step: int, data: Mapping[str, Any], config: Any, keep: int) -> None:
    """Write `out/checkpoints/step_N` of tensors, numbers and texts, and the configuration beside them.

    Then delete the oldest beyond `keep`, and those of later steps, which are left from a run that was begun anew.
    """
    folder = Path(out) / "checkpoints"
    with atomic_directory(folder / f"step_{step:09d}") as temporary:
        torch.save(dict(data), temporary / "state.pt")
        write_json(temporary / "config.json", to_mapping(config))
    found = list_checkpoints(out)
    earlier = [path for number, path in found if number <= step]
    for path in [*earlier[:-keep], *(path for number, path in found if number > step)]:
        shutil.rmtree(path)


def read_newest(out: str | Path) -> dict[str, Any] | None:
    """What the newest checkpoint of a run holds, on the CPU; None where there is none."""
    checkpoints = list_checkpoints(out)
    if not checkpoints:
        return None
    path = checkpoints[-1][1] / "state.pt"
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except (RuntimeError, EOFError, OSError, UnpicklingError) as error:
        why = (str(error).splitlines() or ["nothing in it"])[0]
        raise ValueError(f"{path}: expected a whole checkpoint, got {type(error).__name__}: {why}") from None


def restore_parts(parts: Mapping[str, Any], data: Mapping[str, Any], others: Sequence[str]) -> None:
    """Give every part (a thing with a state_dict) what a checkpoint holds for it.

    others: the names of all else that the checkpoint must hold; it may hold nothing more.
    """
    expected = {*others, *parts}
    if data.keys() != expected:
        differing = sorted(data.keys() ^ expected)
        raise ValueError(f"checkpoint: expected the parts of this configuration, got a difference in {differing}")
    for name, part in parts.items():
        try:
            part.load_state_dict(data[name])
        except (RuntimeError, ValueError) as error:
            why = str(error).splitlines()[0]
            raise ValueError(f"checkpoint: expected {name} of this configuration, got {why}") from None


def list_checkpoints(out: str | Path) -> list[tuple[int, Path]]:
    """(step, folder) of all whole checkpoints of a run, oldest first."""
    folder = Path(out) / "checkpoints"
    found = [(int(match[1]), path) for path in folder.glob("step_*") if (match := _NAME.search(path.name))]
    return sorted(found)


def resume(state: TrainState) -> bool:
    """Take up the newest checkpoint of the run, if there is one."""
    data = read_newest(state.config.out)
    if data is None:
        return False
    _restore(state, data)
    return True


def _networks(state: TrainState) -> dict[str, Any]:
    """All things with a state_dict, by name."""
    things = {
        "tokenizer": state.tokenizer,
        "optimizer": state.optimizer,
        "captions": state.objective.captions,
        "discriminator": state.discriminator,
        "discriminator_optimizer": state.discriminator_optimizer,
        "ema": state.ema,
        "upkeep": state.upkeep,
        "scaler": getattr(state.accelerator, "scaler", None),
    }
    return {name: thing for name, thing in things.items() if thing is not None}


def _collect(state: TrainState) -> dict[str, Any]:
    return {
        "step": state.step,
        "seconds": state.seconds,
        "counts": state.counts,
        "generator": state.generator.get_state(),
        "rng": torch.get_rng_state(),
        **{name: thing.state_dict() for name, thing in _networks(state).items()},
    }


def _restore(state: TrainState, data: dict[str, Any]) -> None:
    restore_parts(_networks(state), data, ("step", "seconds", "counts", "generator", "rng"))
    state.step, state.seconds, state.counts = data["step"], data["seconds"], data["counts"]
    state.generator.set_state(data["generator"])
    torch.set_rng_state(data["rng"])
