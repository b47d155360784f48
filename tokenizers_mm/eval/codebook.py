"""Codebook health of a set of codes: exact usage and perplexity per stream and scale."""

from collections.abc import Iterable
from typing import Any

import torch

from tokenizers_mm._check import require
from tokenizers_mm.functional.usage import count_ids, perplexity, usage
from tokenizers_mm.types import ImageCodes


def codebook_health(codes: Iterable[ImageCodes]) -> dict[str, Any]:
    """{stream: {usage, perplexity, codebook_size, ids, scales: [...]}} over all codes of one tokenizer.

    `usage` is the share of codes that occur at least once, in [0, 1]; it cannot exceed ids / codebook_size.
    """
    batches = list(codes)
    require(len(batches) > 0, "codes", "at least one batch", "none")
    report: dict[str, Any] = {}
    for index, stream in enumerate(batches[0].streams):
        total = torch.zeros(stream.codebook_size, dtype=torch.int64)
        scales: dict[int, torch.Tensor] = {}
        for batch in batches:
            start = 0
            ids = batch.stream(stream.name).cpu()
            for scale, (rows, columns) in enumerate(batch.streams[index].grids):
                counts = count_ids(ids[:, start : start + rows * columns], stream.codebook_size)
                start += rows * columns
                scales[scale] = scales.get(scale, 0) + counts
                total += counts
        report[stream.name] = {
            "usage": usage(total),
            "perplexity": perplexity(total),
            "codebook_size": stream.codebook_size,
            "ids": int(total.sum()),
            "scales": [{"usage": usage(c), "perplexity": perplexity(c)} for _, c in sorted(scales.items())],
        }
    return report
