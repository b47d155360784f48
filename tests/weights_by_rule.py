"""Weights that are not stored: made from a tensor's name by the rules of the reference cases' READMEs."""

import json
import re
import zlib

import numpy as np
import torch
from torch import Tensor

from tests.cases import Case

_GAMMA = 0x9E3779B97F4A7C15
_TABLES = (
    "pos_embed",
    "positional_embedding",
    "position_embedding",
    "cls_token",
    "class_embedding",
    "probe",
    "lvl_embed",
    "pos_1lc",
    "embed_tokens",
)


def tokenflow_weights(case: Case) -> dict[str, Tensor]:
    """The state dict of a TokenFlow case, from state_keys.json."""
    keys, seed = json.loads((case.folder / "state_keys.json").read_text()), case.config["weights"]["seed"]
    return {name: rule_tensor(name, spec, seed) for name, spec in keys.items()}


def uniform(name: str, shape: list[int] | tuple[int, ...], seed: int) -> np.ndarray:
    """float32 in [-1, 1), from the crc32 of the name (splitmix64)."""
    start = (zlib.crc32(name.encode()) + (seed << 32)) * 0xD1342543DE82EF95 + _GAMMA
    with np.errstate(over="ignore"):
        z = np.arange(int(np.prod(shape)), dtype=np.uint64) + np.uint64(start % 2**64)
        for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
            z = (z ^ (z >> np.uint64(shift))) * np.uint64(factor)
        z ^= z >> np.uint64(31)
    return ((z >> np.uint64(40)).astype(np.float32) / np.float32(2**23) - np.float32(1)).reshape(shape)


def offset_and_amplitude(name: str, shape: list[int] | tuple[int, ...]) -> tuple[float, float]:
    """Offset and amplitude of a name by the rule: value = offset + amplitude * uniform."""
    name = name.lower()
    if "embedding_vqkd" in name or "embedding_vqgan" in name:
        return 0.0, 1.0
    if "running_var" in name:
        return 1.0, 0.5
    if "running_mean" in name:
        return 0.0, 0.2
    if found := re.search(r"(norm|ln_|bn)\w*\.(weight|bias)$", name):
        return (1.0, 0.3) if found.group(2) == "weight" else (0.0, 0.2)
    if len(shape) <= 1:
        return 0.0, 0.1
    if any(word in name for word in _TABLES):
        return 0.0, 0.5
    return 0.0, float(np.sqrt(3.0 / np.prod(shape[1:])) * 1.2)


def rule_tensor(name: str, spec: dict, seed: int) -> Tensor:
    shape = spec["shape"]
    if "value" in spec:
        return torch.tensor(spec["value"], dtype=torch.float32).reshape(shape)
    if spec.get("zeros"):
        return torch.zeros(shape)
    offset, amplitude = offset_and_amplitude(name, shape)
    return torch.from_numpy(np.float32(offset) + np.float32(amplitude) * uniform(name, shape, seed))
