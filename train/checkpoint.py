"""Checkpoints of a run: whole or not there, the newest few kept, read without unpickling code."""

import re
import shutil
from pathlib import Path
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
    folder = Path(state.config.out) / "checkpoints"
    with atomic_directory(folder / f"step_{state.step:09d}") as temporary:
        torch.save(_collect(state), temporary / "state.pt")
        write_json(temporary / "config.json", to_mapping(state.config))
    for _, path in list_checkpoints(state.config.out)[: -state.config.keep]:
        shutil.rmtree(path)


def list_checkpoints(out: str | Path) -> list[tuple[int, Path]]:
    """(step, folder) of all whole checkpoints of a run, oldest first."""
    folder = Path(out) / "checkpoints"
    found = [(int(match[1]), path) for path in folder.glob("step_*") if (match := _NAME.search(path.name))]
    return sorted(found)


def resume(state: TrainState) -> bool:
    """Take up the newest checkpoint of the run, if there is one."""
    checkpoints = list_checkpoints(state.config.out)
    if not checkpoints:
        return False
    path = checkpoints[-1][1] / "state.pt"
    try:
        data = torch.load(path, map_location="cpu", weights_only=True)
    except (RuntimeError, EOFError, OSError) as error:
        raise ValueError(f"{path}: expected a whole checkpoint, got {type(error).__name__}: {error}") from None
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
        **state.others,
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
    networks = _networks(state)
    expected = {"step", "seconds", "counts", "generator", "rng", *networks}
    if data.keys() != expected:
        differing = sorted(data.keys() ^ expected)
        raise ValueError(f"checkpoint: expected the parts of this configuration, got a difference in {differing}")
    for name, thing in networks.items():
        try:
            thing.load_state_dict(data[name])
        except (RuntimeError, ValueError) as error:
            why = str(error).splitlines()[0]
            raise ValueError(f"checkpoint: expected {name} of this configuration, got {why}") from None
    state.step, state.seconds, state.counts = data["step"], data["seconds"], data["counts"]
    state.generator.set_state(data["generator"])
    torch.set_rng_state(data["rng"])
