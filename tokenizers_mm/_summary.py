"""Facts about a saved tokenizer that config.json holds beside its configuration, read without torch.

`save_id` is a hash of all else in config.json. It stands in the metadata of model.safetensors too, which binds the two
files. `summary` answers `tokenizers-mm info`, and is believed only where both files are whole and of one save.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from tokenizers_mm._files import settle

CONFIG, WEIGHTS = "config.json", "model.safetensors"

SAVE_ID, SUMMARY = "save_id", "summary"

LARGEST, LONGEST = 4 << 20, 10_000
"""Limits of config.json in bytes, and of a text in it in characters."""


def save_id(config: Mapping[str, Any]) -> str:
    """A hash of all entries of config.json but itself."""
    return _hash({name: value for name, value in config.items() if name != SAVE_ID})


def tensors_id(shapes: Mapping[str, Sequence[int]]) -> str:
    """A hash of the names and shapes of tensors."""
    return _hash({name: list(shape) for name, shape in shapes.items()})


def read_lines(directory: Path) -> list[str] | None:
    """The lines of `describe` from the files alone; None where only loading can tell.

    That is so for files of older versions, for what was edited since, and for what is broken.
    """
    path = directory / CONFIG
    try:
        if not path.is_file() or path.stat().st_size > LARGEST or not (directory / WEIGHTS).is_file():
            return None
        settle(directory)
        config = json.loads(path.read_text(encoding="utf-8"))
        if config[SAVE_ID] != save_id(config):
            return None
        with safe_open(directory / WEIGHTS, framework="np") as file:
            names = file.keys()
            shapes = {name: file.get_slice(name).get_shape() for name in names}
            mark = (file.metadata() or {}).get(SAVE_ID)
        if mark != config[SAVE_ID] or tensors_id(shapes) != config[SUMMARY]["tensors"]:
            return None
        if not _is_sound(config["family"], config[SUMMARY], config["provenance"]):
            return None
        return describe(config["family"], config[SUMMARY], config["provenance"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError, SafetensorError):
        return None


def describe(family: str, summary: Mapping[str, Any], provenance: Mapping[str, str]) -> list[str]:
    """Lines for a person: family, parameters, image size, streams, and where the weights come from."""
    size = summary["image_size"]
    shown = f"{size[0]} x {size[1]}" if size else f"any multiple of {summary['size_multiple']}"
    lines = [f"family       {family}", f"parameters   {summary['parameters']:,}", f"image size   {shown}"]
    for stream in summary["streams"]:
        count = sum(rows * columns for rows, columns in stream["grids"])
        grids = " ".join(f"{rows}x{columns}" for rows, columns in stream["grids"])
        lines.append(f"stream       {stream['name']}: {count} ids, {stream['codebook_size']} codes, grids {grids}")
    for name, count in summary.get("codebooks", {}).items():  # where the size of the image decides how many ids
        lines.append(f"stream       {name}: {count} codes")
    names = ("source", "license", "sha256", "notice")
    return lines + [f"{name:<12} {provenance[name]}" for name in names if provenance[name]]


def _is_sound(family: Any, summary: Mapping[str, Any], provenance: Mapping[str, Any]) -> bool:
    """True if all that `describe` prints has the right types, in printable text: anybody may have written it."""
    streams, size = summary["streams"], summary["image_size"]
    sides = [side for stream in streams for grid in stream["grids"] for side in _pair(grid)]
    numbers = [summary["parameters"], summary["size_multiple"], *_pair(size or [1, 1]), *sides]
    codebooks = summary.get("codebooks", {})
    numbers += [*(stream["codebook_size"] for stream in streams), *codebooks.values()]
    texts = [family, *codebooks, *(stream["name"] for stream in streams), *provenance.values()]
    return all(type(number) is int and 0 <= number < 1 << 63 for number in numbers) and all(
        isinstance(text, str) and len(text) <= LONGEST and " ".join(text.split()).isprintable() for text in texts
    )


def _pair(value: Any) -> list[Any]:
    if not isinstance(value, list) or len(value) != 2:
        raise ValueError
    return value


def _hash(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:32]
