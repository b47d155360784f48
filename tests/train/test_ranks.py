"""What ranks say to each other: two processes over gloo."""

from multiprocessing import get_context
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn

from train.descent import descend


def _rank(rank: int, folder: str) -> None:
    """Three weights: all ranks, one rank, no rank has a gradient."""
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    weights = [nn.Parameter(torch.ones(2)) for _ in range(3)]
    weights[0].grad = torch.full((2,), 1.0 + rank)
    if rank == 1:
        weights[1].grad = torch.full((2,), 4.0)
    optimizer = torch.optim.SGD(weights, lr=1.0, weight_decay=0.5)
    norm = descend(optimizer, 1.0, 100.0, 0)
    torch.save({"weights": [w.detach() for w in weights], "norm": norm}, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def test_gradients_are_averaged_and_what_no_rank_has_is_left_alone(tmp_path: Path) -> None:
    with get_context("spawn").Pool(2) as pool:
        pool.starmap_async(_rank, [(rank, str(tmp_path)) for rank in range(2)], chunksize=1).get(timeout=60)
    for rank in range(2):
        found = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
        # Means 1.5 and 2, each with decay 0.5; the third weight does not even decay.
        assert [float(w[0]) for w in found["weights"]] == [1 - 1.5 - 0.5, 1 - 2.0 - 0.5, 1.0]
        assert abs(found["norm"] - (2 * 1.5**2 + 2 * 2.0**2) ** 0.5) < 1e-5
