"""Finite scalar quantization (arXiv 2309.15505): no codebook is stored, none can collapse."""

import math
from dataclasses import dataclass
from typing import Annotated, Literal

import torch
from torch import Tensor, nn

from tokenizers_mm import kernels
from tokenizers_mm._check import require
from tokenizers_mm.config import Length, Range, Width, checked
from tokenizers_mm.functional.scalar import ids_to_levels, levels_to_ids, round_to_levels
from tokenizers_mm.quantizers.base import Quantizer, in_float32
from tokenizers_mm.types import Quantized


@dataclass(frozen=True)
class FSQConfig:
    """levels of each channel that is rounded (their product is the number of codes); dim channels in and out, with
    linear maps between the two."""

    levels: Annotated[tuple[Annotated[int, Range(2, 1 << 16)], ...], Length(1, 64)]
    dim: Width
    kind: Literal["fsq"] = "fsq"

    def check(self) -> None:
        """Refuse more codes than ids can count."""
        count = math.prod(self.levels)
        require(count < 1 << 62, "levels", "numbers with a product below 2^62", self.levels)


class FSQ(Quantizer):
    """z [..., dim] -> ids below prod(levels) and vectors; it has no loss terms."""

    Config = FSQConfig

    def __init__(self, config: FSQConfig) -> None:
        super().__init__()
        self.config = config = checked(config)
        self.codebook_size, self.dim = math.prod(config.levels), config.dim
        self.project_in = nn.Linear(config.dim, len(config.levels))
        self.project_out = nn.Linear(len(config.levels), config.dim)

    @in_float32
    def quantize(self, z: Tensor) -> Quantized:
        levels = self.config.levels
        whole = round_to_levels(_linear(self.project_in, z), levels)
        terms = {} if self.training else None
        ids = kernels.finite_ids(z, levels_to_ids(whole, levels), self.query_names[0])
        return Quantized(self._expand(whole), ids, terms, queries=z.detach())

    def look_up(self, ids: Tensor) -> Tensor:
        return self._expand(ids_to_levels(ids, self.config.levels))

    @property
    def revivable(self) -> bool:
        return False

    def set_codes(self, ids: Tensor, vectors: Tensor) -> None:
        raise ValueError("FSQ: expected no revival of codes (it has no codebook), got a request for it")

    def _expand(self, whole: Tensor) -> Tensor:
        """Whole numbers scaled to [-1, 1] and mapped to `dim` channels."""
        return _linear(self.project_out, whole / (torch.tensor(self.config.levels, device=whole.device) // 2))


def _linear(layer: nn.Linear, x: Tensor) -> Tensor:
    """A linear map in the dtype of x, whatever the dtype of its weights."""
    return nn.functional.linear(x, layer.weight.to(x.dtype), layer.bias.to(x.dtype))
