"""Accelerate's trackers beside log.jsonl: TensorBoard, Weights & Biases, trackio. Rank 0 alone has one."""

import importlib
import math
import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from tokenizers_mm._files import write_text
from tokenizers_mm.config import to_mapping

from .state import State


class Trackers:
    """Scalars and images of a run, by step. A run that is resumed here goes on as the same run there."""

    def __init__(self, state: State, resumed: bool) -> None:
        self._accelerator, folder = state.accelerator, Path(state.config.out)
        if not state.config.trackers:
            return
        name = folder / "trackers" / "name"
        if not (resumed and name.is_file()):
            write_text(name, secrets.token_hex(8))
        known = name.read_text(encoding="utf-8")
        options = {
            "tensorboard": {"purge_step": state.step + 1},  # the events of later steps, which come again
            "wandb": {"id": known, "resume": "allow", "dir": str(name.parent)},
            "trackio": {"name": known, "resume": "allow"},
        }
        self._accelerator.init_trackers(folder.resolve().name, _flat(to_mapping(state.config)), options)

    def log(self, step: int, line: Mapping[str, Any]) -> None:
        """The numbers of a line of the log."""
        numbers = {n: v for n, v in line.items() if n != "step" and isinstance(v, (int, float)) and math.isfinite(v)}
        self._accelerator.log(numbers, step=step)

    def image(self, step: int, path: Path) -> None:
        """The image of a file, by the name of its folder."""
        for tracker in self._accelerator.trackers:
            pixels = np.asarray(Image.open(path).convert("RGB"))
            if tracker.name == "trackio":  # whose class in accelerate takes no images
                value: Any = importlib.import_module("trackio").Image(pixels)
                tracker.log({path.parent.name: value}, step=step)
            else:
                layout = {"dataformats": "NHWC"} if tracker.name == "tensorboard" else {}
                tracker.log_images({path.parent.name: pixels[None]}, step=step, **layout)

    def close(self) -> None:
        """Flush and close."""
        for tracker in self._accelerator.trackers:
            tracker.finish()


def _flat(value: Any, key: str = "") -> dict[str, Any]:
    """Numbers and texts of nested mappings by dotted key, as trackers take them."""
    if isinstance(value, Mapping):
        return {name: item for part in value for name, item in _flat(value[part], f"{key}.{part}").items()}
    return {key.removeprefix("."): value if isinstance(value, (bool, int, float)) else str(value)}
