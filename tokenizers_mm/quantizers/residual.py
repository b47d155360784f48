"""Residual quantization: each takes what the ones before it left over (SoundStream, arXiv 2107.03312, 3.3)."""

from dataclasses import dataclass
from typing import Annotated, Any, Literal

import torch
from torch import Tensor, nn

from tokenizers_mm._check import require
from tokenizers_mm.config import Choice, Range, checked
from tokenizers_mm.quantizers.base import QUANTIZERS, Quantizer, build_quantizer, in_float32, mean_terms
from tokenizers_mm.types import Quantized


@dataclass(frozen=True)
class ResidualConfig:
    """depth stages, each a quantizer of its own that is configured by `stage`."""

    stage: Annotated[Any, Choice(QUANTIZERS, "vq")]
    depth: Annotated[int, Range(1, 64)]
    kind: Literal["residual"] = "residual"

    @property
    def dim(self) -> Any:
        """Channels of a stage."""
        return self.stage.dim


class ResidualQuantizer(Quantizer):
    """z [..., D] -> ids [..., depth], one per stage, coarse to fine, and the sum of their vectors.

    The vectors that a stage takes away carry no gradient, so z receives the gradient of the sum once from every stage.
    The terms are means over the stages.

    Raises: ValueError for a stage with several ids per vector.
    """

    Config = ResidualConfig

    def __init__(self, config: ResidualConfig) -> None:
        super().__init__()
        self.config = config = checked(config)
        stages = [build_quantizer(config.stage) for _ in range(config.depth)]
        require(stages[0].groups == 1, "stage", "a quantizer with one id per vector", config.stage.kind)
        self.stages = nn.ModuleList(stages)
        self.codebook_size, self.dim, self.groups = stages[0].codebook_size, stages[0].dim, config.depth
        self.loss_terms = stages[0].loss_terms

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
        return Quantized(total, torch.stack([part.ids for part in parts], -1), mean_terms(parts), z.detach())

    def look_up(self, ids: Tensor) -> Tensor:
        vectors = [stage.look_up(part) for stage, part in zip(self.stages, ids.unbind(-1), strict=True)]  # type: ignore[operator]
        return torch.stack(vectors).sum(0)

    @property
    def revivable(self) -> bool:
        return self.stages[0].revivable  # type: ignore[return-value]

    @torch.no_grad()
    def set_codes(self, ids: Tensor, vectors: Tensor) -> None:
        """As the base class says; a code of a stage is put where the stages before it leave its vector."""
        residual = vectors
        for index, stage in enumerate(self.stages):
            chosen = ids // self.codebook_size == index
            stage.set_codes(ids[chosen] % self.codebook_size, residual[chosen])  # type: ignore[operator]
            residual = residual - stage(residual).vectors
