"""Several codebooks side by side: the channels are split, each part has a quantizer of its own (UniTok, 2502.20321)."""

from dataclasses import dataclass
from typing import Annotated, Any, Literal

import torch
from torch import Tensor, nn

from tokenizers_mm._check import require
from tokenizers_mm.config import Choice, Range, checked
from tokenizers_mm.quantizers.base import QUANTIZERS, Quantizer, build_quantizer, in_float32, mean_terms
from tokenizers_mm.types import Quantized


@dataclass(frozen=True)
class MultiCodebookConfig:
    """count equal parts of the channels, each with a quantizer of its own that is configured by `part`."""

    part: Annotated[Any, Choice(QUANTIZERS, "vq")]
    count: Annotated[int, Range(1, 1024)]
    kind: Literal["multi_codebook"] = "multi_codebook"

    @property
    def dim(self) -> Any:
        """Channels of all parts."""
        return self.part.dim * self.count


class MultiCodebook(Quantizer):
    """z [..., count * part.dim] -> ids [..., count * groups of a part], part after part, and the vectors side by side.

    The terms are means over the parts.
    """

    Config = MultiCodebookConfig

    def __init__(self, config: MultiCodebookConfig) -> None:
        super().__init__()
        self.config = config = checked(config)
        parts = [build_quantizer(config.part) for _ in range(config.count)]
        self.parts = nn.ModuleList(parts)
        self.codebook_size, self.dim = parts[0].codebook_size, config.dim
        self.groups = config.count * parts[0].groups
        self.loss_terms = parts[0].loss_terms

    def name_queries(self, *names: str) -> None:
        super().name_queries(*names)
        for part in self.parts:
            part.name_queries(*names)  # type: ignore[operator]

    @in_float32
    def quantize(self, z: Tensor) -> Quantized:
        require(z.shape[-1] == self.dim, self.query_names[0], f"float [..., {self.dim}]", z)
        parts = [part(piece) for part, piece in zip(self.parts, z.chunk(len(self.parts), -1), strict=True)]
        ids = torch.cat([self._split(part.ids) for part in parts], dim=-1)
        queries = torch.cat([part.queries for part in parts], dim=-1)
        vectors = torch.cat([part.vectors for part in parts], dim=-1)
        return Quantized(vectors, ids if self.groups > 1 else ids[..., 0], mean_terms(parts), queries)

    def look_up(self, ids: Tensor) -> Tensor:
        ids = ids if self.groups > 1 else ids[..., None]
        pieces = ids.chunk(len(self.parts), dim=-1)
        single = self.groups == len(self.parts)
        found = [
            part.look_up(piece[..., 0] if single else piece)  # type: ignore[operator]
            for part, piece in zip(self.parts, pieces, strict=True)
        ]
        return torch.cat(found, dim=-1)

    @property
    def revivable(self) -> bool:
        return self.parts[0].revivable  # type: ignore[return-value]

    def set_codes(self, ids: Tensor, vectors: Tensor) -> None:
        size = self.codebook_size * self.groups // len(self.parts)
        for index, (part, piece) in enumerate(zip(self.parts, vectors.chunk(len(self.parts), dim=-1), strict=True)):
            chosen = ids // size == index
            part.set_codes(ids[chosen] % size, piece[chosen])  # type: ignore[operator]

    def _split(self, ids: Tensor) -> Tensor:
        """Ids of a part with an axis of groups."""
        return ids if self.groups > len(self.parts) else ids[..., None]
