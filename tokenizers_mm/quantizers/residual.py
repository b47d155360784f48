"""Residual quantization: each takes what the ones before it left over (SoundStream, arXiv 2107.03312, 3.3)."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from tokenizers_mm._check import require
from tokenizers_mm.quantizers.base import Quantizer, in_float32, mean_terms
from tokenizers_mm.types import Quantized


class ResidualQuantizer(Quantizer):
    """z [..., D] -> ids [..., n], one per quantizer, coarse to fine, and the sum of their vectors.

    All have codebooks of one size. What a stage takes away carries no gradient, so z receives the gradient of the sum
    once from every stage. The terms are means over the stages.
    """

    def __init__(self, stages: Sequence[Quantizer]) -> None:
        super().__init__()
        require(len(stages) > 0, "stages", "at least one quantizer", "none")
        sizes = {(stage.codebook_size, stage.dim) for stage in stages}
        require(len(sizes) == 1, "stages", "codebooks of one size and width", sorted(sizes))
        self.stages = nn.ModuleList(stages)
        self.codebook_size, self.dim = stages[0].codebook_size, stages[0].dim

    def name_queries(self, *names: str) -> None:
        super().name_queries(*names)
        for stage in self.stages:
            stage.name_queries(*names)  # type: ignore[operator]

    @in_float32
    def quantize(self, z: Tensor) -> Quantized:
        residual, parts = z, []
        for stage in self.stages:
            parts.append(stage(residual))
            residual = residual - parts[-1].vectors.detach()
        total = torch.stack([part.vectors for part in parts]).sum(0)
        return Quantized(total, torch.stack([part.ids for part in parts], -1), mean_terms(parts))

    def look_up(self, ids: Tensor) -> Tensor:
        vectors = [stage.look_up(part) for stage, part in zip(self.stages, ids.unbind(-1), strict=True)]  # type: ignore[operator]
        return torch.stack(vectors).sum(0)

    @property
    def revivable(self) -> bool:
        return False

    def set_codes(self, ids: Tensor, vectors: Tensor) -> None:
        raise ValueError("stages: expected one quantizer to revive codes of (residual.stages[i]), got all of them")
