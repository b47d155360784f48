"""Usage counts of codes and the revival of dead ones: explicit calls after the step."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import torch
from torch import Tensor

from tokenizers_mm._check import require
from tokenizers_mm._ranks import rank_and_world, sum_over_ranks
from tokenizers_mm.config import Range
from tokenizers_mm.functional.usage import count_ids, perplexity, usage
from tokenizers_mm.quantizers.base import Quantizer
from tokenizers_mm.types import Quantized


@dataclass(frozen=True)
class RevivalConfig:
    """Revival of codes that are not used.

    every: steps between revivals, 0 for none. until: share of the run after which no codes are revived.
    """

    every: Annotated[int, Range(0)] = 0
    until: Annotated[float, Range(0, 1)] = 0.8


MAX_COUNTED = 1 << 22
"""Limit of the codes whose use is counted. Larger codebooks are made of bits: nothing in them can be revived."""


class CodebookHealth:
    """Counts which codes were used, in a window of the log and since the last revival; exact over all ranks.

    Every rank revives the same codes with the same vectors, drawn from all samples of a step: its division into ranks
    and micro-batches changes nothing.
    """

    def __init__(self, quantizers: Mapping[str, Quantizer], revival: RevivalConfig, where: str = "revival") -> None:
        """quantizers: of a tokenizer, by stream. where: how errors call the configuration."""
        self.revival, self.quantizers = revival, dict(quantizers)
        fixed = sorted(name for name, quantizer in self.quantizers.items() if not quantizer.revivable)
        movable = len(self.quantizers) > 0 and not fixed
        expected = "0 (no codebook of this model has codes that can be moved)"
        require(not revival.every or movable, f"{where}.every", expected, revival.every)
        self.counted = {name: q for name, q in self.quantizers.items() if q.codebook_size * q.groups <= MAX_COUNTED}
        self._step: dict[str, Tensor] = {}
        self._queries: dict[str, list[Tensor]] = {}
        self.shown = {
            name: torch.zeros(q.codebook_size * q.groups, dtype=torch.int64) for name, q in self.counted.items()
        }
        self.unrevived = {name: counts.clone() for name, counts in self.shown.items()}

    def count(self, quantized: Mapping[str, Quantized]) -> None:
        """Add a micro-batch of this process."""
        for name, found in quantized.items():
            if self.revival.every and found.queries is not None:
                self._queries.setdefault(name, []).append(found.queries.flatten(0, -2))
        for name, quantizer in self.counted.items():
            ids = quantized[name].ids
            if quantizer.groups > 1:
                ids = ids + torch.arange(quantizer.groups, device=ids.device) * quantizer.codebook_size
            counts = count_ids(ids, quantizer.codebook_size * quantizer.groups)
            self._step[name] = self._step.get(name, 0) + counts

    def after_step(self, step: int, progress: float, generator: torch.Generator) -> dict[str, float]:
        """Add the counts of all ranks; when it is time, move unused codes onto random queries of this step.

        step: number of the step that is done, from 1. progress: share of the run that is done.
        """
        for name, counts in sorted(self._step.items()):
            total = sum_over_ranks(counts).cpu()
            self.shown[name] += total
            self.unrevived[name] += total
        every, queries = self.revival.every, self._queries
        self._step, self._queries = {}, {}
        if not every or step % every or progress >= self.revival.until:
            return {}
        return {"revived": float(sum(self._revive(name, parts, generator) for name, parts in queries.items()))}

    def _revive(self, name: str, queries: Sequence[Tensor], generator: torch.Generator) -> int:
        """Move the codes of a stream not used since the last call onto queries of a step; returns how many."""
        unused = (self.unrevived[name] == 0).nonzero()[:, 0]
        self.unrevived[name].zero_()
        unused = unused[torch.randperm(len(unused), generator=generator)]
        chosen = _draw(queries, len(unused), generator)
        unused = unused[: len(chosen)].to(chosen.device)
        if len(unused):
            self.quantizers[name].set_codes(unused, chosen)
        return len(unused)

    def window(self) -> dict[str, float]:
        """Usage and perplexity of the codes since the last call."""
        line: dict[str, float] = {}
        for name, counts in self.shown.items():
            line[f"usage_{name}"], line[f"perplexity_{name}"] = usage(counts), perplexity(counts)
            counts.zero_()
        return line

    def state_dict(self) -> dict[str, Any]:
        """Both counts."""
        return {"shown": dict(self.shown), "unrevived": dict(self.unrevived)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore both counts."""
        for own, kept in ((self.shown, state["shown"]), (self.unrevived, state["unrevived"])):
            for name, counts in own.items():
                counts.copy_(kept[name])


def _draw(parts: Sequence[Tensor], count: int, generator: torch.Generator) -> Tensor:
    """At most `count` random rows, without replacement, of parts [N, D] of all ranks; the same on every rank.

    Rows are numbered as the samples of a step are: the first part of every rank, the second of every rank, and so on.
    """
    rank, world = rank_and_world()
    sizes = torch.zeros(len(parts), world, dtype=torch.int64, device=parts[0].device)
    sizes[:, rank] = torch.tensor([len(part) for part in parts])
    ends = sum_over_ranks(sizes).flatten().cumsum(0).view_as(sizes).tolist()
    drawn = torch.randperm(ends[-1][-1], generator=generator)[:count].to(parts[0].device)
    chosen = parts[0].new_zeros(len(drawn), parts[0].shape[1])
    for part, line in zip(parts, ends, strict=True):
        place = drawn - (line[rank] - len(part))
        here = (place >= 0) & (place < len(part))
        chosen[here] = part[place[here]]
    return sum_over_ranks(chosen)
