"""Weights that are not stored: made from a tensor's name by the rules of the reference cases' READMEs."""

import json

import numpy as np
import torch
from torch import Tensor

from benchmarks.tiny import offset_and_amplitude, uniform
from tests.cases import Case


def tokenflow_weights(case: Case) -> dict[str, Tensor]:
    """The state dict of a TokenFlow case, from state_keys.json."""
    keys, seed = json.loads((case.folder / "state_keys.json").read_text()), case.config["weights"]["seed"]
    return {name: rule_tensor(name, spec, seed) for name, spec in keys.items()}


def rule_tensor(name: str, spec: dict, seed: int) -> Tensor:
    shape = spec["shape"]
    if "value" in spec:
        return torch.tensor(spec["value"], dtype=torch.float32).reshape(shape)
    if spec.get("zeros"):
        return torch.zeros(shape)
    offset, amplitude = offset_and_amplitude(name, shape)
    return torch.from_numpy(np.float32(offset) + np.float32(amplitude) * uniform(name, shape, seed))
