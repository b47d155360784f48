"""Several rows in one sequence, none of which sees another."""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from tokenizers_mm._check import require
from tokenizers_mm.llm.batch import IGNORED, Batch, Row, join_rows, pad_rows


def pack_rows(
    rows: Sequence[Row], length: int, pad_id: int, *, window: int | None = None, causal: bool = True
) -> Batch:
    """Rows put together into sequences of `length` tokens; each row goes where the least room is left.

    The mask, float [B, 1, L, L], lets a token see only its own row, up to itself where `causal`, and at most `window`
    tokens back for a model with such a window. Positions are each row's own, and no row is predicted from the end of
    another. The order of the rows is not kept.
    """
    longest = max((len(row) for row in rows), default=0)
    require(0 < longest <= length, "rows", f"1 to {length} tokens each", f"{longest}")
    bins: list[list[Row]] = []
    room: list[int] = []
    for row in sorted(rows, key=len, reverse=True):
        fitting = [index for index, left in enumerate(room) if left >= len(row)]
        if fitting:
            best = min(fitting, key=lambda index: room[index])
            bins[best].append(row)
            room[best] -= len(row)
        else:
            bins.append([row])
            room.append(length - len(row))
    joined = [join_rows(p, torch.cat([row.position_ids for row in p]), p[0].longest_image) for p in bins]
    batch = pad_rows(joined, pad_id, "right", length)
    owner = torch.full(batch.input_ids.shape, -1)
    for line, parts in enumerate(bins):
        start = 0
        for number, row in enumerate(parts):
            owner[line, start : start + len(row)] = number
            batch.labels[line, start] = IGNORED
            start += len(row)
    return replace(batch, attention_mask=block_mask(owner, window, causal))


def block_mask(owner: Tensor, window: int | None = None, causal: bool = True) -> Tensor:
    """Float mask [B, 1, L, L] from the row each token belongs to, int64 [B, L], -1 for padding.

    0 where a token may look, the lowest float32 where not. Padding sees itself, so that no line of the mask is empty.
    """
    order = torch.arange(owner.shape[1], device=owner.device)
    back = order[:, None] - order
    allowed = owner[:, :, None] == owner[:, None, :]
    if causal:
        allowed = allowed & (back >= 0)
    if window is not None:
        allowed = allowed & (back.abs() < window)
    allowed = torch.where((owner < 0)[:, :, None], back == 0, allowed)
    return torch.zeros(allowed.shape, device=owner.device).masked_fill(~allowed, torch.finfo(torch.float32).min)[
        :, None
    ]
