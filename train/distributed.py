"""Data-parallel collectives for numbers that engines do not handle. No-ops in a single process."""

import importlib.util
from pathlib import Path

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.utils import ProjectConfiguration
from torch import Tensor

from tokenizers_mm._check import require

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
    here = accelerator.device.type
    require(kind in ("", here), "config.device", f"a device of this machine, such as {here}", device)
    return accelerator


def several() -> bool:
    """Whether there is more than one process."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def sum_over_ranks(tensor: Tensor) -> Tensor:
    """Sum over the ranks, in place."""
    if several():
        dist.all_reduce(tensor)
    return tensor


def share_from_first(tensor: Tensor) -> Tensor:
    """Value of rank 0 on all ranks, in place."""
    if several():
        dist.broadcast(tensor, 0)
    return tensor


def agree(seconds: float, signal: int, device: torch.device) -> tuple[float, int]:
    """Time of rank 0 and the highest signal number that any rank received, so that all ranks end together."""
    if not several():
        return seconds, signal
    found = torch.tensor([seconds if dist.get_rank() == 0 else 0.0, signal], dtype=torch.float64, device=device)
    dist.all_reduce(found, op=dist.ReduceOp.MAX)
    return float(found[0]), int(found[1])
