"""Usage counts of codes and the revival of dead ones: explicit calls after the step."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any

import torch
from torch import Tensor

from tokenizers_mm._check import require
from tokenizers_mm._ranks import share_from_first, sum_over_ranks
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

    Every rank revives the same codes with the same vectors.
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
        self._last: dict[str, Quantized] = {}
        self.shown = {
            name: torch.zeros(q.codebook_size * q.groups, dtype=torch.int64) for name, q in self.counted.items()
        }
        self.unrevived = {name: counts.clone() for name, counts in self.shown.items()}

    def count(self, quantized: Mapping[str, Quantized]) -> None:
        """Add a micro-batch of this process."""
        self._last = dict(quantized)
        for name, quantizer in self.counted.items():
            ids = quantized[name].ids
            if quantizer.groups > 1:
                ids = ids + torch.arange(quantizer.groups, device=ids.device) * quantizer.codebook_size
            counts = count_ids(ids, quantizer.codebook_size * quantizer.groups)
            self._step[name] = self._step.get(name, 0) + counts

    def after_step(self, step: int, progress: float, generator: torch.Generator) -> dict[str, float]:
        """Add the counts of all ranks; when it is time, move unused codes onto random queries of this batch.

        step: number of the step that is done, from 1. progress: share of the run that is done.
        """
        for name, counts in sorted(self._step.items()):
            total = sum_over_ranks(counts).cpu()
            self.shown[name] += total
            self.unrevived[name] += total
        self._step = {}
        every = self.revival.every
        if not every or step % every or progress >= self.revival.until:
            return {}
        return {"revived": float(self.revive(generator))}

    def revive(self, generator: torch.Generator) -> int:
        """Move the codes not used since the last call onto queries of the last micro-batch; returns how many."""
        revived = 0
        for name, quantizer in self.quantizers.items():
            queries = self._last[name].queries
            unused = (self.unrevived[name] == 0).nonzero()[:, 0]
            self.unrevived[name].zero_()
            if queries is None or len(unused) == 0:
                continue
            flat = queries.reshape(-1, queries.shape[-1])
            unused = unused[torch.randperm(len(unused), generator=generator)[: len(flat)]]
            chosen = flat[torch.randperm(len(flat), generator=generator)[: len(unused)].to(flat.device)]
            quantizer.set_codes(unused.to(flat.device), share_from_first(chosen))
            revived += len(unused)
        return revived

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
