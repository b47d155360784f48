"""Training of a language model on rows of text and images, to be read aloud."""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from tokenizers_mm.llm import Batch

from .config import OptimizerConfig
from .schedule import learning_rate


@dataclass(frozen=True)
class FitConfig:
    """steps: optimizer steps at most. max_seconds: end (and finish the schedule) earlier, 0 for never.

    log_every: steps between reports, over which the loss is averaged.
    """

    optimizer: OptimizerConfig
    steps: int = 1000
    max_seconds: float = 0.0
    log_every: int = 20


def fit(
    model: Any,
    next_batch: Callable[[], Batch],
    config: FitConfig,
    report: Callable[[dict[str, float]], None] = lambda line: None,
) -> dict[str, float]:
    """Next-token cross-entropy on the labels of the batches; returns the last report."""
    device = model.get_input_embeddings().weight.device
    parameters = [p for p in model.parameters() if p.requires_grad]
    options = config.optimizer
    optimizer = torch.optim.AdamW(parameters, options.lr, options.betas, weight_decay=options.weight_decay)
    model.train()
    started, line = time.perf_counter(), {}
    losses: list[float] = []
    for step in range(config.steps):
        seconds = time.perf_counter() - started
        if config.max_seconds and seconds >= config.max_seconds:
            break
        progress = max(step / config.steps, seconds / config.max_seconds if config.max_seconds else 0.0)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(options, step, progress)
        loss = model(**next_batch().to(device).model_inputs()).loss
        loss.backward()
        norm = float(nn.utils.clip_grad_norm_(parameters, options.clip))
        if not math.isfinite(norm):
            raise FloatingPointError(f"gradients are not finite at step {step}")
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses = [*losses[1 - config.log_every :], float(loss.detach())]
        line = {"step": step + 1, "seconds": time.perf_counter() - started, "loss": sum(losses) / len(losses)}
        line |= {"grad_norm": norm, "lr": optimizer.param_groups[0]["lr"]}
        if (step + 1) % config.log_every == 0:
            report(line)
    model.eval()
    return line
