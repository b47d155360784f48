"""Revival: unused codes move onto queries of the whole step, however the step is divided."""

from typing import Any

import pytest
import torch

from tokenizers_mm.quantizers import VQConfig, revival
from tokenizers_mm.quantizers.revival import CodebookHealth, RevivalConfig
from tokenizers_mm.quantizers.vq import VQ


def seeded(number: int) -> torch.Generator:
    return torch.Generator().manual_seed(number)


def revived(z: torch.Tensor, parts: int, every: int = 1) -> tuple[torch.Tensor, dict[str, float]]:
    """Codes after a step over z [B, L, D] in so many micro-batches."""
    torch.manual_seed(0)
    quantizer = VQ(VQConfig(64, 8))
    health = CodebookHealth({"pixel": quantizer}, RevivalConfig(every))
    for part in z.chunk(parts):
        health.count({"pixel": quantizer.quantize(part)})
    values = health.after_step(1, 0.0, seeded(3))
    return quantizer.codes.detach(), values


def test_unused_codes_become_different_queries_of_all_micro_batches() -> None:
    z = torch.randn(8, 4, 8, generator=seeded(1)) * 3
    torch.manual_seed(0)
    start = VQ(VQConfig(64, 8))
    before, used = start.codes.detach(), set(start.quantize(z).ids.flatten().tolist())
    whole, values = revived(z, 1)
    divided, _ = revived(z, 4)
    assert values == {"revived": float(min(32, 64 - len(used)))}
    assert torch.equal(whole, divided)
    moved = [row for row in range(64) if not torch.equal(whole[row], before[row])]
    rows = [next(i for i, query in enumerate(z.flatten(0, 1)) if torch.equal(whole[row], query)) for row in moved]
    assert len(set(rows)) == len(rows) == values["revived"]
    assert {row // 8 for row in rows} == {0, 1, 2, 3}


def test_queries_of_all_ranks_are_drawn_as_of_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two micro-batches on each of two ranks, of different lengths: what the ranks hold adds up to one draw."""
    z = torch.randn(20, 8, generator=seeded(1))
    parts = z.split([3, 5, 4, 8])  # first of rank 0, first of rank 1, second of rank 0, second of rank 1
    alone = revival._draw([z], 12, seeded(2))
    assert len({tuple(row) for row in alone.tolist()}) == 12
    total: Any = torch.zeros(12, 8)
    for rank in (0, 1):
        sums = iter([lambda _: torch.tensor([[3, 5], [4, 8]]), lambda rows: total.add_(rows)])
        monkeypatch.setattr(revival, "rank_and_world", lambda rank=rank: (rank, 2))
        monkeypatch.setattr(revival, "sum_over_ranks", lambda value, sums=sums: next(sums)(value))
        revival._draw(parts[rank::2], 12, seeded(2))
    assert torch.equal(total, alone)


def test_no_revival_keeps_no_queries() -> None:
    codes, values = revived(torch.randn(4, 4, 8, generator=seeded(1)), 2, every=0)
    torch.manual_seed(0)
    assert torch.equal(codes, VQ(VQConfig(64, 8)).codes.detach())
    assert values == {}
