"""Codebook health of a set of codes: exact usage and perplexity per stream and scale."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from tokenizers_mm._check import require
from tokenizers_mm.functional.usage import count_ids, perplexity, usage
from tokenizers_mm.types import ImageCodes


class CodebookCounts:
    """How often every code occurs, by stream and scale: what `codebook_health` reports, one batch after another."""

    def __init__(self) -> None:
        self._counts: dict[str, list[Tensor]] = {}

    def add(self, codes: ImageCodes) -> None:
        """Count the ids of a batch."""
        for stream in codes.streams:
            scales = self._counts.setdefault(stream.name, [])
            sizes = [rows * columns for rows, columns in stream.grids]
            ids = codes.stream(stream.name).cpu()
            ends = torch.tensor(sizes).cumsum(0).clamp_max(ids.shape[1]).tolist()
            for scale, (start, end) in enumerate(zip([0, *ends], ends, strict=False)):
                counts = count_ids(ids[:, start:end], stream.codebook_size)
                if scale < len(scales):
                    scales[scale] += counts
                else:
                    scales.append(counts)

    def report(self) -> dict[str, Any]:
        """{stream: {usage, perplexity, codebook_size, ids, scales: [...]}}; empty where nothing was counted."""
        found: dict[str, Any] = {}
        for name, scales in self._counts.items():
            total = torch.stack(scales).sum(0)
            found[name] = {
                "usage": usage(total),
                "perplexity": perplexity(total),
                "codebook_size": len(total),
                "ids": int(total.sum()),
                "scales": [{"usage": usage(c), "perplexity": perplexity(c)} for c in scales],
            }
        return found


def codebook_health(codes: Iterable[ImageCodes]) -> dict[str, Any]:
    """{stream: {usage, perplexity, codebook_size, ids, scales: [...]}} over all codes of one tokenizer.

    `usage` is the share of codes that occur at least once, in [0, 1]; it cannot exceed ids / codebook_size.
    """
    counts = CodebookCounts()
    for batch in codes:
        counts.add(batch)
    report = counts.report()
    require(len(report) > 0, "codes", "at least one batch", "none")
    return report
