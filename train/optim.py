"""Optimizers: their configuration, the learning rate over a stage, and one step of one of them."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from tokenizers_mm.config import Range

from .engine import local, whole

Beta = Annotated[float, Range(0, 1, high_open=True)]


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW.

    schedule: of the learning rate over the stage, after `warmup` steps. clip: the largest norm of all gradients of this
    optimizer together.
    """

    lr: Annotated[float, Range(0)] = 1e-4
    betas: tuple[Beta, Beta] = (0.9, 0.95)
    weight_decay: Annotated[float, Range(0)] = 0.0
    schedule: Literal["constant", "cosine"] = "constant"
    warmup: Annotated[int, Range(0)] = 0
    clip: Annotated[float, Range(0, low_open=True)] = 1.0


@dataclass(frozen=True)
class Learner:
    """Parameters (or groups of them with options of their own) and the options of their optimizer.

    begins: step of the stage at which its schedule begins.
    """

    options: OptimizerConfig
    parameters: Sequence[nn.Parameter] | Sequence[dict[str, Any]]
    begins: int = 0


def adamw(learner: Learner) -> torch.optim.Optimizer:
    """New AdamW for a learner; fused on CUDA."""
    options = learner.options
    parameters: Any = list(learner.parameters)
    optimizer = torch.optim.AdamW(parameters, lr=options.lr, betas=options.betas, weight_decay=options.weight_decay)
    if all(p.is_cuda for group in optimizer.param_groups for p in group["params"]):
        for group in optimizer.param_groups:
            group["fused"] = True
    return optimizer


def load_optimizer(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """Restore the moments; rates, betas and decay stay as the present configuration says."""
    fresh = [{k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups]
    optimizer.load_state_dict(state)
    for group, options in zip(optimizer.param_groups, fresh, strict=True):
        group.update(options)


def learning_rate(config: OptimizerConfig, step: int, progress: float) -> float:
    """Linear warm-up over `warmup` steps, then constant, or a half cosine to zero as progress goes from 0 to 1."""
    warm = min(1.0, (step + 1) / config.warmup) if config.warmup else 1.0
    decay = 0.5 * (1 + math.cos(math.pi * min(1.0, progress))) if config.schedule == "cosine" else 1.0
    return config.lr * warm * decay


def total_norm(gradients: Sequence[Tensor]) -> float:
    """Norm of gradients together, of sharded ones with all of their shards."""
    kinds = [[g for g in gradients if isinstance(g, DTensor) == sharded] for sharded in (False, True)]
    return math.hypot(*(float(whole(nn.utils.get_total_norm(kind))) for kind in kinds if kind))


def descend(
    optimizer: torch.optim.Optimizer,
    rate: float,
    clip: float,
    scaler: Any = None,
    not_finite: Callable[[], None] | None = None,
) -> float:
    """Clip, step, clear; returns the norm before clipping. A step whose norm is not finite is left out.

    scaler: of float16 gradients; it leaves such a step out itself and tries a smaller scale; None without one.
    not_finite: called for such a step, with a scaler only when a scale below 1 did not help; it may raise. By default
    it is an error.
    """
    for group in optimizer.param_groups:
        group["lr"] = rate
    if scaler is not None:
        scaler.unscale_(optimizer)
    gradients = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
    norm = total_norm(gradients)
    if norm > clip and math.isfinite(norm):
        shards = [local(gradient) for gradient in gradients]
        torch._foreach_mul_(shards, clip / (norm + 1e-6))  # pyright: ignore[reportPrivateImportUsage]
    if scaler is not None:
        scaler.step(optimizer)
        scaler.update()
    elif math.isfinite(norm):
        optimizer.step()
    if not math.isfinite(norm) and (scaler is None or scaler.get_scale() < 1):
        if not_finite is None:
            raise FloatingPointError("gradients are not finite")
        not_finite()
    optimizer.zero_grad(set_to_none=True)
    return norm
