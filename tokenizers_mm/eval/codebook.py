"""Codebook health of a set of codes: usage, perplexity, dead codes, entropies, ideal code length; exact counts."""

import math
import re
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from tokenizers_mm._check import require
from tokenizers_mm.functional.usage import adaptive_code_length, count_ids, entropy, perplexity, usage
from tokenizers_mm.types import ImageCodes, Stream

MAX_PAIRS = 1 << 22
"""Different pairs of neighbouring ids that are counted; where there are more, no conditional entropy is reported."""

MAX_CODES = 1 << 24
"""Codes of a stream that is counted; counts of a larger one would take too much memory, and few codes come twice."""

NEIGHBOURS = ("previous", "up")
"""Contexts of an id: the one before it in its row-major grid, the one above it."""


class CodebookCounts:
    """Counts of every code, by stream and scale, and of every pair of neighbours; one batch after another."""

    def __init__(self) -> None:
        self._counts: dict[str, list[Tensor]] = {}
        self._pairs: dict[str, tuple[Tensor, Tensor]] = {}
        self.images = 0

    def add(self, codes: ImageCodes) -> None:
        """Count the ids of a batch, but for streams of more than MAX_CODES codes."""
        self.images += len(codes)
        for stream in codes.streams:
            if stream.codebook_size > MAX_CODES:
                continue
            scales = self._counts.setdefault(stream.name, [])
            ids = codes.stream(stream.name).cpu()
            for scale, grid in enumerate(_grids(ids, stream)):
                counts = count_ids(grid, stream.codebook_size)
                if scale < len(scales):
                    scales[scale] += counts
                else:
                    scales.append(counts)
                self._add_pairs(f"{stream.name}/previous", grid.flatten(1)[:, :-1], grid.flatten(1)[:, 1:], stream)
                self._add_pairs(f"{stream.name}/up", grid[:, :-1], grid[:, 1:], stream)

    def _add_pairs(self, name: str, before: Tensor, ids: Tensor, stream: Stream) -> None:
        """Count pairs (context, id), as sorted keys and their counts; none at all once there are too many."""
        old_keys, old = self._pairs.get(name, (torch.empty(0, dtype=torch.int64),) * 2)
        if len(old_keys) > MAX_PAIRS:
            return
        keys = (before * stream.codebook_size + ids).flatten()
        keys, places = torch.unique(torch.cat([old_keys, keys]), return_inverse=True)
        counts = torch.zeros(len(keys), dtype=torch.int64)
        counts.index_add_(0, places, torch.cat([old, torch.ones(len(places) - len(old), dtype=torch.int64)]))
        self._pairs[name] = keys, counts

    def report(self) -> dict[str, Any]:
        """{stream: {usage, perplexity, codebook_size, ids, dead, entropy, conditional, bits, scales: [...]}}.

        bits: nominal and entropy-coded, per image. Empty where nothing was counted.
        """
        found: dict[str, Any] = {}
        for name, scales in self._counts.items():
            total = torch.stack(scales).sum(0)
            ids, nominal = int(total.sum()), int(total.sum()) * math.log2(max(2, len(total)))
            found[name] = {
                **_health(total),
                "codebook_size": len(total),
                "ids": ids,
                "entropy": entropy(total),
                "conditional": {context: self._conditional(name, context, len(total)) for context in NEIGHBOURS},
                "bits": {  # one more bit says which of two ways an ideal coder takes
                    "nominal": nominal / self.images,
                    "entropy_coded": min(nominal, adaptive_code_length(total)) / self.images,
                },
                "scales": [_health(counts) for counts in scales],
                "histogram": total.sort(descending=True).values.tolist()[:4096],
            }
        return found

    def _conditional(self, name: str, context: str, size: int) -> dict[str, Any] | None:
        """Entropy of an id given a neighbour, in bits: that of the pairs less that of the contexts.

        Both have a bias; with fewer than four pairs per different pair the estimate is far too low, and `reliable` is
        false. None where there are no pairs, or too many to count.
        """
        keys, counts = self._pairs.get(f"{name}/{context}", (torch.empty(0), torch.empty(0)))
        if not len(keys) or len(keys) > MAX_PAIRS:
            return None
        before = torch.zeros(size, dtype=torch.int64).index_add_(0, keys // size, counts)
        pairs = int(counts.sum())
        value = max(0.0, entropy(counts) - entropy(before))
        return {"bits": value, "pairs": pairs, "different": len(keys), "reliable": pairs >= 4 * len(keys)}

    def state(self) -> dict[str, Tensor]:
        """All counts, as tensors by name."""
        found = {f"counts/{name}/{i}": c for name, scales in self._counts.items() for i, c in enumerate(scales)}
        for name, (keys, counts) in self._pairs.items():
            found |= {f"keys/{name}": keys, f"pairs/{name}": counts}
        return found | {"images": torch.tensor(self.images)}

    @classmethod
    def restored(cls, state: Mapping[str, Tensor]) -> "CodebookCounts":
        """The counts that a `state` holds; ValueError where a tensor has another form."""
        counts = cls()
        for name, tensor in state.items():
            axes = 0 if name == "images" else 1
            right = tensor.dtype == torch.int64 and tensor.ndim == axes and bool((tensor >= 0).all())
            require(right, f"state.{name}", f"whole numbers from 0 on, with {axes} axes", tensor)
        require("images" in state, "state.images", "a number", "nothing")
        counts.images = int(state["images"])
        scales = [key for key in state if re.fullmatch(r"counts/.*/[0-9]{1,6}", key)]
        for key in sorted(scales, key=lambda key: int(key.rpartition("/")[2])):
            counts._counts.setdefault(key.removeprefix("counts/").rpartition("/")[0], []).append(state[key])
        for name, found in counts._counts.items():
            sizes = {len(scale) for scale in found}
            require(len(sizes) == 1, f"state.counts/{name}", "scales of one codebook", sorted(sizes))
        named = {kind: {k.removeprefix(kind) for k in state if k.startswith(kind)} for kind in ("keys/", "pairs/")}
        require(named["keys/"] == named["pairs/"], "state.pairs", "pairs and a count of each", sorted(state))
        for name in named["keys/"]:
            key = f"keys/{name}"
            size, found = len(counts._counts.get(name.rpartition("/")[0], [()])[0]), state.get(f"pairs/{name}")
            right = found is not None and len(found) == len(state[key]) and bool((state[key] < size**2).all())
            require(right, f"state.{key}", "pairs of codes and a count of each", state[key])
            assert found is not None
            counts._pairs[name] = state[key], found
        return counts


def _grids(ids: Tensor, stream: Stream) -> list[Tensor]:
    """The ids of one stream by scale, each [B, rows, columns]; scales that are missing at the end are left out."""
    grids, start = [], 0
    for rows, columns in stream.grids:
        part = ids[:, start : start + rows * columns]
        start += rows * columns
        if part.shape[1] == rows * columns:
            grids.append(part.view(-1, rows, columns))
    return grids


def _health(counts: Tensor) -> dict[str, Any]:
    return {"usage": usage(counts), "perplexity": perplexity(counts), "dead": int((counts == 0).sum())}


def codebook_health(codes: Iterable[ImageCodes]) -> dict[str, Any]:
    """The report of `CodebookCounts` over all codes of one tokenizer.

    `usage` is the share of codes that occur at least once, in [0, 1]; it cannot exceed ids / codebook_size.
    """
    counts = CodebookCounts()
    for batch in codes:
        counts.add(batch)
    report = counts.report()
    require(len(report) > 0, "codes", "at least one batch", "none")
    return report
