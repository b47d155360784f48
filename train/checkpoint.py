"""Checkpoints of a run: whole or not there, verified by hashes, the newest few kept, read without unpickling.

`out/checkpoints/step_N` holds tensors.safetensors, state.json (all else, with names of tensors in their places),
config.json and sha256.json. Tensors are whole whatever the engine, so any number of processes can go on from them.
torch.distributed.checkpoint is not used: the metadata that it reads first is a pickle.
"""

import json
import os
import re
import shutil
import sys
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

from torch import Tensor

from tokenizers_mm._check import expecting, fail
from tokenizers_mm._files import sha256
from tokenizers_mm.config import read_json, to_mapping
from tokenizers_mm.models.loading import read_safetensors
from tokenizers_mm.models.saving import save_tensors

from .config import HARMLESS, RunConfig
from .engine import whole
from .state import State

_NAME = re.compile(r"step_(\d{9})$")
TENSORS, STATE, CONFIG, HASHES = "tensors.safetensors", "state.json", "config.json", "sha256.json"
NEW, REPLACED, GONE = ".new", ".replaced", ".gone"
"""Name of the folder in which a checkpoint is written, and endings of the names of those that leave their places."""


class Checkpoints:
    """The writer of a run's checkpoints; with `async_save` they are written by a thread while training goes on."""

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._writing: Future[None] | None = None

    def save(self, state: State) -> None:
        """Save `out/checkpoints/step_N`, then delete the oldest beyond `keep`. Called on every rank; rank 0 writes."""
        self.finish()
        contents = _gather(state)
        if state.accelerator.is_main_process:
            if state.config.async_save:
                self._writing = self._thread.submit(_replace, state.config, state.step, *contents)
            else:
                _replace(state.config, state.step, *contents)
        state.accelerator.wait_for_everyone()

    def finish(self) -> None:
        """Wait for the checkpoint that is being written, if any; raises what its writer raised."""
        writing, self._writing = self._writing, None
        if writing is not None:
            writing.result()

    def close(self) -> None:
        """Wait, without an error of its own, and end the thread."""
        self._thread.shutdown()


def _gather(state: State) -> tuple[Any, dict[str, Tensor]]:
    """JSON and tensors of a state, shards gathered; empty but on rank 0. A copy where it is written later."""
    tensors: dict[str, Tensor] = {}
    main, later = state.accelerator.is_main_process, state.config.async_save

    def take(name: str, tensor: Tensor) -> None:
        found = whole(tensor.detach())
        if main:
            tensors[name] = found.to("cpu", copy=True) if later else found

    return _encode(state.state_dict(), "", take), tensors


def _replace(config: RunConfig, step: int, skeleton: Any, tensors: dict[str, Tensor]) -> None:
    """Write a checkpoint beside its place and move it there, then delete what is no longer kept.

    Those of later steps, which an earlier run left that `resume: never` replaced, go too.
    """
    folder = Path(config.out) / "checkpoints"
    folder.mkdir(parents=True, exist_ok=True)
    _remove_leftovers(folder)
    temporary = folder / NEW
    temporary.mkdir()
    try:
        _write(temporary, config, skeleton, tensors)
        target = folder / f"step_{step:09d}"
        if target.exists():
            os.replace(target, folder / f".{target.name}{REPLACED}")
        os.replace(temporary, target)
    except OSError as error:
        fail(f"checkpoint of step {step}", "to be written", f"{type(error).__name__}: {error}")
    finally:
        _remove_leftovers(folder)
    found = list_checkpoints(config.out)
    ahead = [path for number, path in found if number > step]
    for path in ahead + [path for number, path in found if number <= step][: -config.keep]:
        os.replace(path, folder / f".{path.name}{GONE}")  # so that a kill leaves no half of one
    _remove_leftovers(folder)


def _remove_leftovers(folder: Path) -> None:
    """Remove what is neither a checkpoint nor another program's, of this writer or of one that was killed.

    A checkpoint that was to be replaced, and whose place is still empty, comes back first.
    """
    for old in folder.glob(f".step_*{REPLACED}"):
        place = folder / old.name.removeprefix(".").removesuffix(REPLACED)
        if not place.exists():
            os.replace(old, place)
    for leftover in [folder / NEW, *folder.glob(f".step_*{REPLACED}"), *folder.glob(f".step_*{GONE}")]:
        shutil.rmtree(leftover, ignore_errors=True)


def list_checkpoints(out: str | Path) -> list[tuple[int, Path]]:
    """(step, folder) of all checkpoints of a run, oldest first."""
    folder = Path(out) / "checkpoints"
    return sorted((int(match[1]), path) for path in folder.glob("step_*") if (match := _NAME.search(path.name)))


def resume(state: State) -> bool:
    """Continue from the newest whole checkpoint, if there is one. A damaged one is passed over with a sentence."""
    damaged: list[str] = []
    if state.accelerator.is_main_process:
        _remove_leftovers(Path(state.config.out) / "checkpoints")
    state.accelerator.wait_for_everyone()
    for _, folder in reversed(list_checkpoints(state.config.out)):
        try:
            data = read_checkpoint(folder)
        except ValueError as error:
            damaged.append(str(error))
            continue
        for sentence in damaged:
            print(f"{sentence}; continuing from {folder.name}", file=sys.stderr)
        changed = _differences(read_json(folder / CONFIG), to_mapping(state.config))
        with expecting(str(folder), "a checkpoint of this run", RuntimeError):
            _check_changes(state, folder, changed, data)
            state.load_state_dict(data)
        if changed and state.accelerator.is_main_process:
            print(f"continuing with other values of {', '.join(sorted(changed))}", file=sys.stderr)
        return True
    if damaged:
        raise ValueError(f"{damaged[0]} (resume=never starts anew)")
    return False


def read_checkpoint(folder: Path) -> dict[str, Any]:
    """Contents of a checkpoint; ValueError for one that is damaged."""
    hashes = read_json(folder / HASHES)
    if hashes.keys() != {TENSORS, STATE, CONFIG}:
        fail(str(folder / HASHES), f"hashes of {TENSORS}, {STATE} and {CONFIG}", sorted(map(str, hashes)))
    for name, expected in hashes.items():
        path = folder / name
        if not path.is_file():
            fail(str(path), "a whole checkpoint", "no such file")
        if sha256(path) != expected:
            fail(str(path), "a whole checkpoint", "contents of another hash")
    # The parameters of a large model exceed the limits of `read_json`.
    with expecting(str(folder / STATE), "the state of a run", RecursionError):
        return _decode(json.loads((folder / STATE).read_text(encoding="utf-8")), read_safetensors(folder / TENSORS))


def _write(folder: Path, config: RunConfig, skeleton: Any, tensors: dict[str, Tensor]) -> None:
    save_tensors(_apart(tensors), folder / TENSORS)
    (folder / STATE).write_text(json.dumps(skeleton), encoding="utf-8")
    (folder / CONFIG).write_text(json.dumps(to_mapping(config), indent=2), encoding="utf-8")
    hashes = {name: sha256(folder / name) for name in (TENSORS, STATE, CONFIG)}
    (folder / HASHES).write_text(json.dumps(hashes), encoding="utf-8")
    for path in folder.iterdir():
        with open(path, "rb") as stream:
            os.fsync(stream.fileno())


def _encode(value: Any, name: str, take: Callable[[str, Tensor], None]) -> Any:
    """JSON for a value: mappings as lists of pairs (keys may be numbers); tensors are given to `take` by name."""
    if isinstance(value, Tensor):
        take(name, value)
        return {"tensor": name}
    if isinstance(value, dict):
        return {"map": [[key, _encode(item, f"{name}/{key}", take)] for key, item in value.items()]}
    if isinstance(value, (list, tuple)):
        return {"list": [_encode(item, f"{name}/{index}", take) for index, item in enumerate(value)]}
    if value is None or isinstance(value, (bool, int, float, str)):
        return {"value": value}
    fail(f"checkpoint: {name}", "a number, text, tensor, list or mapping", type(value).__name__)


def _decode(value: dict[str, Any], tensors: dict[str, Tensor]) -> Any:
    """Inverse of `_encode`; tuples come back as lists."""
    if "tensor" in value:
        return tensors[value["tensor"]]
    if "map" in value:
        return {key: _decode(item, tensors) for key, item in value["map"]}
    if "list" in value:
        return [_decode(item, tensors) for item in value["list"]]
    return value["value"]


def _apart(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same tensors, each with memory of its own (tied weights share theirs, which the format refuses)."""
    seen: set[int] = set()
    found = {}
    for name, tensor in tensors.items():
        place = tensor.untyped_storage().data_ptr()
        found[name] = tensor.clone() if place in seen else tensor
        seen.add(place)
    return found


def _differences(before: Any, now: Any, key: str = "") -> dict[str, tuple[Any, Any]]:
    """Values that differ between two configurations, by dotted key."""
    if isinstance(before, dict) and isinstance(now, dict):
        found: dict[str, tuple[Any, Any]] = {}
        for name in before.keys() | now.keys():
            found |= _differences(before.get(name), now.get(name), f"{key}.{name}".removeprefix("."))
        return found
    return {} if before == now else {key: (before, now)}


def _check_changes(state: State, folder: Path, changed: dict[str, Any], data: dict[str, Any]) -> None:
    """Every difference of the configuration is applied from here on, or refused by name."""
    objective = state.objective
    fixed = ("seed", "objective.kind", *(f"objective.{key}" for key in objective.FIXED))
    for key in sorted(changed):
        if key.startswith(tuple(f"{name}." for name in fixed)) or key in fixed or key in objective.fixed_here():
            before = changed[key][0]
            raise ValueError(f"config.{key}: expected {before} as in {folder} (or resume=never), got another {key}")
    counters = data["counters"]
    done = counters["stage"] == len(objective.stages) - 1 and counters["stage_step"] >= objective.stages[-1].steps
    effective = sorted(key for key in changed if key not in HARMLESS and key not in ("steps", "max_seconds"))
    if done and effective:
        raise ValueError(
            f"config.{effective[0]}: expected {changed[effective[0]][0]}, since this run is finished "
            f"(or more steps, another out, resume=never), got another {effective[0]}"
        )
