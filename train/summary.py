"""Summary of a finished run, shown at its end: where everything is, the last measurements, curves."""

import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .config import RunConfig
from .log import read_log

COUNTS = ("step", "seconds", "stage")
"""Entries of a line of the log that are no measurements."""

MAX_PANELS = 18


def summarize(config: RunConfig) -> list[str]:
    """Lines for a person; leaves curves.png in the folder of the run where matplotlib is installed."""
    folder = Path(config.out)
    lines = read_log(folder / "log.jsonl") if (folder / "log.jsonl").is_file() else []
    told = [_told(line) for line in last_lines(lines)]
    if curves := curves_of(lines):
        told += draw_curves(folder, curves)
    best = folder / "best"
    told += [f"the best by {config.best} is in {best}"] if best.is_dir() else []
    tokenizer = folder / "tokenizer"
    return [*told, f"the tokenizer is in {tokenizer}" if tokenizer.is_dir() else f"the networks are in {folder}"]


def last_lines(lines: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The last measurements of training and the last of validation."""
    training = [line for line in lines if "loss" in line][-1:]
    return training + [line for line in lines if any(name.startswith("validation_") for name in line)][-1:]


def curves_of(lines: Sequence[dict[str, Any]]) -> dict[str, list[tuple[float, float]]]:
    """Curves of (step, value) by name, of everything measured twice or more, the loss first.

    Those of a stage before the last have its number before their name.
    """
    found: dict[str, list[tuple[float, float]]] = {}
    last = max((line.get("stage", 0) for line in lines), default=0)
    for line in lines:
        before = f"stage {line['stage']} " if line.get("stage", last) < last else ""
        for name, value in line.items():
            if name not in COUNTS and isinstance(value, (int, float)) and "step" in line:
                found.setdefault(before + name, []).append((line["step"], value))
    order = sorted((name for name, points in found.items() if len(points) > 1), key=lambda name: name != "loss")
    return {name: found[name] for name in order[:MAX_PANELS]}


def draw_curves(folder: Path, curves: dict[str, list[tuple[float, float]]]) -> list[str]:
    """Write curves.png and say so; nothing without matplotlib."""
    if importlib.util.find_spec("matplotlib") is None:
        return []
    from tokenizers_mm.eval.pictures import plot_curves

    plot_curves(curves, folder / "curves.png")
    return [f"curves: {folder / 'curves.png'}"]


def _told(line: dict[str, Any]) -> str:
    values = [f"{name} {value:.4g}" for name, value in line.items() if name not in COUNTS and isinstance(value, float)]
    return f"step {line['step']}: {', '.join(values)}"
