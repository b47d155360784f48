"""Processes of a run: the device and settings of this one, and what all agree on after a step."""

import importlib.util
from collections import Counter
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.utils import ProjectConfiguration

from tokenizers_mm._check import require
from tokenizers_mm._ranks import several

from .config import RunConfig


def make_accelerator(config: RunConfig) -> Accelerator:
    """Accelerator of this process, on the device of a configuration, which must exist; "auto" is CUDA or the CPU."""
    device, precision = config.device, config.precision
    kind = "" if device == "auto" else device.partition(":")[0]
    require(kind in ("", "cpu", "cuda"), "config.device", "auto, cpu or cuda", device)
    cpu = kind == "cpu" or not torch.cuda.is_available()
    require(precision != "fp16" or not cpu, "config.precision", "fp32 or bf16 on a CPU", precision)
    for name in config.trackers:
        here = importlib.util.find_spec(name) is not None
        require(here, "config.trackers", f"installed packages (pip install {name})", name)
    accelerator = Accelerator(
        cpu=cpu,
        mixed_precision="no" if precision == "fp32" else precision,
        log_with=list(config.trackers) or None,
        project_config=ProjectConfiguration(config.out, str(Path(config.out) / "trackers")),
    )
    missing = sorted(set(config.trackers) - {str(tracker) for tracker in accelerator.log_with})
    require(not missing, "config.trackers", "trackers that accelerate finds", missing)
    here = accelerator.device.type
    require(kind in ("", here), "config.device", f"a device of this machine, such as {here}", device)
    return accelerator


def agree(seconds: float, signal: int, device: torch.device) -> tuple[float, int]:
    """Time of rank 0 and the highest signal number that any rank received, so that all ranks end together."""
    if not several():
        return seconds, signal
    found = torch.tensor([seconds if dist.get_rank() == 0 else 0.0, signal], dtype=torch.float64, device=device)
    dist.all_reduce(found, op=dist.ReduceOp.MAX)
    return float(found[0]), int(found[1])


def count_over_ranks(counts: Counter[str]) -> dict[str, float]:
    """Counts of all ranks together, by name. Called on every rank."""
    found: list[Any] = [counts]
    if several():
        found = [None] * dist.get_world_size()
        dist.all_gather_object(found, counts)
    return {name: float(number) for name, number in sum(found, Counter()).items()}
