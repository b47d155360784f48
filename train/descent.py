"""A step of an optimizer, for every program: average over the ranks, clip, step, clear."""

import math
from typing import Any

import torch
from torch import nn

from .ranks import average_gradients


def descend(optimizer: torch.optim.Optimizer, rate: float, clip: float, step: int, scaler: Any = None) -> float:
    """Average over the ranks, clip, step, clear; returns the norm before clipping. Refuses gradients not finite.

    scaler: of float16 gradients, which leaves out a step of gradients that are not finite and tries a smaller scale.
    """
    for group in optimizer.param_groups:
        group["lr"] = rate
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    average_gradients(parameters)
    if scaler is not None:
        scaler.unscale_(optimizer)
    norm = float(nn.utils.clip_grad_norm_(parameters, clip))
    if scaler is not None:
        scaler.step(optimizer)
        scaler.update()
    elif math.isfinite(norm):
        optimizer.step()
    else:
        raise FloatingPointError(f"gradients are not finite at step {step}")
    optimizer.zero_grad(set_to_none=True)
    return norm
