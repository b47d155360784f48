"""The learning rate over a run."""

import math

from .config import OptimizerConfig


def learning_rate(config: OptimizerConfig, step: int, progress: float) -> float:
    """Linear warm-up over `warmup` steps, then constant, or a half cosine to zero over the run."""
    warm = min(1.0, (step + 1) / config.warmup) if config.warmup else 1.0
    decay = 0.5 * (1 + math.cos(math.pi * min(1.0, progress))) if config.schedule == "cosine" else 1.0
    return config.lr * warm * decay
