"""One step of an optimizer, the same for every program."""

import math
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn

from .ranks import average_gradients


def optimizer_step(
    accelerator: Accelerator, optimizer: torch.optim.Optimizer, rate: float, clip: float, step: int
) -> float:
    """Average the gradients over the ranks, clip, step, clear; returns the norm before clipping.

    rate: the learning rate. step: the number that a message names. Raises FloatingPointError for gradients that are not
    finite; under float16 such a step is left out instead, and the scale of the loss lowered.
    """
    for group in optimizer.param_groups:
        group["lr"] = rate
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    average_gradients(parameters)
    scaler: Any = getattr(accelerator, "scaler", None)
    if scaler is not None:
        scaler.unscale_(optimizer)
    norm = float(nn.utils.clip_grad_norm_(parameters, clip))
    if scaler is not None:
        scaler.step(optimizer)
        scaler.update()
    elif math.isfinite(norm):
        optimizer.step()
    else:
        raise FloatingPointError(f"gradients are not finite at step {step}; the last checkpoint is unharmed")
    optimizer.zero_grad(set_to_none=True)
    return norm
