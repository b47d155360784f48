"""Reading a directory that `ImageTokenizer.save` wrote, and tensors into modules; strict, and no code is executed."""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from tokenizers_mm._check import fail
from tokenizers_mm.config import from_mapping
from tokenizers_mm.models import MODELS, ImageTokenizer, Provenance
from tokenizers_mm.models.saving import CONFIG, FORMAT, WEIGHTS


def load_directory(directory: Path) -> ImageTokenizer[Any]:
    """The tokenizer of a directory, in evaluation mode: every tensor must be there with its shape, and no other."""
    data = read_config(directory / CONFIG)
    family = data.get("family")
    if family not in MODELS:
        fail(f"{directory / CONFIG}: family", f"one of {sorted(MODELS)}", repr(family))
    model = MODELS[family]
    config = from_mapping(model.Config, data.get("config", {}), f"{CONFIG}.config")
    tokenizer = build(model, config)
    fill(tokenizer, read_safetensors(directory / WEIGHTS), str(directory / WEIGHTS))
    tokenizer.provenance = from_mapping(Provenance, data.get("provenance", {}), f"{CONFIG}.provenance")
    return tokenizer.eval()


def build(model: type[ImageTokenizer[Any]], config: Any) -> ImageTokenizer[Any]:
    """A tokenizer ready to be filled: without memory for its weights where that is possible."""
    with torch.device("meta"):
        tokenizer = model.from_config(config)
    persistent = set(tokenizer.state_dict())
    if any(name not in persistent for name, _ in tokenizer.named_buffers()):
        return model.from_config(config)  # buffers that no checkpoint holds must be computed
    return tokenizer


def fill(tokenizer: torch.nn.Module, tensors: dict[str, Tensor], where: str) -> None:
    """Give a model its tensors; names and shapes must match exactly, else one error names the first offenders."""
    account({name: tuple(tensor.shape) for name, tensor in tokenizer.state_dict().items()}, tensors, where)
    tokenizer.load_state_dict(tensors, strict=True, assign=True)


def account(expected: Mapping[str, tuple[int, ...]], tensors: Mapping[str, Tensor], where: str) -> None:
    """Refuse tensors whose names and shapes are not exactly those expected, with one sentence that names the first."""
    missing, unknown = [n for n in expected if n not in tensors], [n for n in tensors if n not in expected]
    wrong = [
        f"{n} (expected {list(expected[n])}, got {list(tensors[n].shape)})"
        for n in expected
        if n in tensors and tuple(tensors[n].shape) != tuple(expected[n])
    ]
    problems = {"missing": missing, "unknown": unknown, "of another shape": wrong}
    found = [f"{len(names)} {what}: {first_few(names)}" for what, names in problems.items() if names]
    if found:
        fail(where, "exactly the tensors of the model", "; ".join(found))


def read_safetensors(path: Path) -> dict[str, Tensor]:
    """All tensors of a safetensors file; one error for a file that is missing, truncated or something else."""
    if not path.is_file():
        fail(str(path), "a safetensors file", "no such file")
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
    except (SafetensorError, OSError, ValueError) as error:
        fail(str(path), "a whole safetensors file", f"{type(error).__name__}: {error}")


def first_few(names: Iterable[str], count: int = 3) -> str:
    """The first names of a list, and how many more there are."""
    names = list(names)
    rest = f" and {len(names) - count} more" if len(names) > count else ""
    return ", ".join(names[:count]) + rest


def read_config(path: Path) -> dict[str, Any]:
    """A config.json of this library, of the format that this version reads."""
    data = read_json(path)
    if data.get("library") != "tokenizers_mm":
        fail(str(path), "a config.json written by tokenizers_mm", "another file")
    if data.get("format") != FORMAT:
        fail(f"{path}: format", str(FORMAT), repr(data.get("format")))
    return data


def read_json(path: Path) -> dict[str, Any]:
    """The mapping of a JSON file; one error for a file that is missing or holds something else."""
    if not path.is_file():
        fail(str(path), f"a {path.name}", "no such file")
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:  # bad JSON, bad UTF-8, a number of too many digits
        fail(str(path), "valid JSON", str(error))
    return data if isinstance(data, dict) else fail(str(path), "a JSON mapping", "another value")
