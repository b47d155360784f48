"""DualViTok's reference weights, which are not stored: made from a tensor's name by the rule of the cases' README."""

import json
from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from tests.cases import Case

_GAMMA = 0x9E3779B97F4A7C15


def dualvitok_weights(case: Case) -> dict[str, Tensor]:
    """The state dict of a case, by its published names, from state_keys.json and the seed and gains of config.json."""
    keys, weights = json.loads((case.folder / "state_keys.json").read_text()), case.config["weights"]
    return {name: by_rule(name, spec["shape"], weights["seed"], weights["gains"]) for name, spec in keys.items()}


def by_rule(name: str, shape: list[int], seed: int, gains: Mapping[str, float]) -> Tensor:
    """One tensor, float32."""
    v = 2.0 * _uniform(name, int(np.prod(shape)), seed) - 1.0
    gain = max(((len(prefix), g) for prefix, g in gains.items() if name.startswith(prefix)), default=(0, 1.0))[1]
    if name.endswith("conv_y.bias"):
        value = 1 + 0.1 * v
    elif name.endswith("frozen_codebook"):
        value = np.sqrt(3.0) * shape[-1] ** -0.5 * v
    elif len(shape) >= 2:
        value = gain * np.sqrt(3.0) / np.sqrt(float(np.prod(shape[1:]))) * v
    elif name.endswith("weight"):
        value = 1 + 0.2 * v
    else:
        value = 0.1 * v
    return torch.from_numpy(value.astype(np.float32)).reshape(shape)


def _uniform(name: str, count: int, seed: int) -> np.ndarray:
    """float64 in [0, 1): splitmix64 from the FNV-1a hash of the name."""
    state = 0xCBF29CE484222325
    for byte in name.encode():
        state = (state ^ byte) * 0x100000001B3 % 2**64
    with np.errstate(over="ignore"):
        start = np.uint64(state ^ (seed * _GAMMA % 2**64))
        x = start + (np.arange(count, dtype=np.uint64) + np.uint64(1)) * np.uint64(_GAMMA)
        for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
            x = (x ^ (x >> np.uint64(shift))) * np.uint64(factor)
        x ^= x >> np.uint64(31)
    return (x >> np.uint64(40)).astype(np.float64) / 2**24
