"""Codebook upkeep: an explicit call after the step, never inside a forward pass."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from tokenizers_mm.functional.usage import count_ids
from tokenizers_mm.models import ImageTokenizer
from tokenizers_mm.quantizers.base import Quantizer
from tokenizers_mm.types import Quantized

from .ranks import share_from_first, sum_counts


class CodebookUpkeep:
    """Counts which codes were used since the last revival, and moves unused ones onto recent queries.

    Counts are exact over all ranks; every rank revives the same codes with the same vectors.
    """

    def __init__(self, sizes: Mapping[str, int], quantizers: Mapping[str, Quantizer]) -> None:
        """sizes: codes of every stream that is counted. quantizers: by stream, those with codes that can be moved."""
        self.quantizers = dict(quantizers)
        self.counts = {name: torch.zeros(size, dtype=torch.int64) for name, size in sizes.items()}

    @classmethod
    def for_tokenizer(cls, tokenizer: ImageTokenizer[Any]) -> "CodebookUpkeep":
        """Of any tokenizer: all streams are counted; codebooks that learn otherwise (SimVQ) are not revived."""
        smallest = tokenizer.image_size or (tokenizer.size_multiple, tokenizer.size_multiple)
        sizes = {stream.name: stream.codebook_size for stream in tokenizer.streams(*smallest)}
        quantizer = getattr(tokenizer, "quantizer", None)
        return cls(sizes, {"shared": quantizer} if isinstance(quantizer, Quantizer) else {})

    def count(self, quantized: Mapping[str, Quantized]) -> dict[str, Tensor]:
        """Add a batch; returns its counts by stream, over all ranks."""
        batch: dict[str, Tensor] = {}
        for name, result in quantized.items():
            batch[name] = sum_counts(count_ids(result.ids, len(self.counts[name]))).cpu()
            self.counts[name] += batch[name]
        return batch

    def after_step(self, quantized: Mapping[str, Quantized], generator: torch.Generator) -> int:
        """Move the codes not used since the last call onto random queries of this batch; returns how many."""
        revived = 0
        for name, quantizer in self.quantizers.items():
            queries = quantized[name].queries
            unused = (self.counts[name] == 0).nonzero()[:, 0]
            self.counts[name].zero_()
            if queries is None or len(unused) == 0:
                continue
            flat = queries.reshape(-1, queries.shape[-1])
            unused = unused[torch.randperm(len(unused), generator=generator)[: len(flat)]]
            chosen = flat[torch.randperm(len(flat), generator=generator)[: len(unused)].to(flat.device)]
            quantizer.set_codes(unused.to(flat.device), share_from_first(chosen))
            revived += len(unused)
        return revived

    def state_dict(self) -> dict[str, Any]:
        """The counts."""
        return dict(self.counts)

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Take up the counts again."""
        self.counts = {name: state[name] for name in self.counts}
