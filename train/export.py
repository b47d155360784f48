"""The networks of a checkpoint as a finished run saves them: `tokenizers-mm export-checkpoint RUN`."""

import argparse
import dataclasses
import sys
from pathlib import Path
from typing import Any

from tokenizers_mm._check import expecting, fail, require
from tokenizers_mm.cli import guarded
from tokenizers_mm.cli.export_checkpoint import add_arguments
from tokenizers_mm.config import read_json

from .checkpoint import CONFIG, list_checkpoints, read_checkpoint
from .config import parse_config
from .state import build_state


def export_checkpoint(run: str, out: str, step: int | None = None) -> int:
    """Write the networks of a checkpoint (the newest by default) to a folder; returns its step.

    Raises: ValueError where there is no such checkpoint, or it is damaged.
    """
    found = dict(list_checkpoints(run))
    require(bool(found), "run", "a folder of a run with checkpoints", run)
    step = max(found) if step is None else step
    if step not in found:
        fail("step", f"one of {sorted(found)}", step)
    config = parse_config(read_json(found[step] / CONFIG))
    plain: dict[str, Any] = {"device": "cpu", "precision": "fp32", "engine": "ddp", "compile": "", "trackers": ()}
    plain |= {"validate_every": 0}  # nothing is measured, and held-out images may be elsewhere
    state = build_state(dataclasses.replace(config, out=out, **plain))
    with expecting(str(found[step]), "a checkpoint of its own configuration", RuntimeError):
        state.load_state_dict(read_checkpoint(found[step]))
    state.objective.save(state.whole(), Path(out))
    return step


def main(arguments: list[str]) -> int:
    """Export, and say where."""
    parser = argparse.ArgumentParser(prog="tokenizers-mm export-checkpoint")
    add_arguments(parser)
    options = parser.parse_args(arguments)

    def export() -> None:
        step = export_checkpoint(options.run, options.out, options.step)
        print(f"{options.out}: the networks of step {step}")

    return guarded("tokenizers-mm export-checkpoint", export)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
