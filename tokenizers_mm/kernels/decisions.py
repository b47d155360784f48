"""A record of what searches decided and by how much, for callers that see ids only (`models.stable`)."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Decision:
    """One search.

    ids: int64 [...]. margin: float [...], as `nearest_code` defines it with `return_margin`; None for ids of a rule
    that tells none.
    """

    ids: Tensor
    margin: Tensor | None


_record: ContextVar[list[Decision] | None] = ContextVar("decisions", default=None)


@contextmanager
def watch_decisions() -> Iterator[list[Decision]]:
    """Collect every decision that is made inside the block, in order; searches then compute margins too.

    Decisions inside of a graph of torch.compile are not seen.
    """
    found: list[Decision] = []
    token = _record.set(found)
    try:
        yield found
    finally:
        _record.reset(token)


def watched() -> bool:
    """True if decisions are collected here."""
    return not torch.compiler.is_compiling() and _record.get() is not None


def decided(ids: Tensor, margin: Tensor | Callable[[], Tensor] | None) -> None:
    """Add a decision to the record. margin: a tensor, or a function that is called where there is a record."""
    if torch.compiler.is_compiling() or (record := _record.get()) is None:
        return
    record.append(Decision(ids.detach(), margin() if callable(margin) else margin))
