"""Data-parallel collectives over tensors. No-ops in a single process."""

import torch.distributed as dist
from torch import Tensor


def several() -> bool:
    """True with more than one process."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def rank_and_world() -> tuple[int, int]:
    """Rank of this process and number of processes."""
    return (dist.get_rank(), dist.get_world_size()) if several() else (0, 1)


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


def mean_over_ranks(tensor: Tensor) -> Tensor:
    """Mean over the ranks, in place."""
    return sum_over_ranks(tensor).div_(dist.get_world_size() if several() else 1)
