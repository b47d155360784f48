"""Finite scalar quantization (arXiv 2309.15505): no codebook is stored, none can collapse."""

import math
from dataclasses import dataclass
from typing import Annotated, Literal

from torch import Tensor, nn

from tokenizers_mm import kernels
from tokenizers_mm._check import require
from tokenizers_mm.config import Length, Range, Width, checked
from tokenizers_mm.functional.scalar import (
    Bound,
    ids_to_levels,
    level_values,
    levels_to_ids,
    round_to_levels,
    rounding_margin,
)
from tokenizers_mm.quantizers.base import Quantizer, in_float32
from tokenizers_mm.types import Quantized


@dataclass(frozen=True)
class FSQConfig:
    """levels of each channel that is rounded (their product is the number of codes); dim channels in and out.

    bound: how channels are bounded before they are rounded: "tanh" (FSQ), "symmetric" (levels symmetric about 0) or
    "sigmoid" (iFSQ, arXiv 2601.17124). project: linear maps from dim channels to the levels' and back; without them
    dim is the number of levels.

    Raises: ValueError where `checked` for 2^62 codes or more, and for another dim than that.
    """

    levels: Annotated[tuple[Annotated[int, Range(2, 1 << 16)], ...], Length(1, 64)]
    dim: Width
    bound: Bound = "tanh"
    project: bool = True
    kind: Literal["fsq"] = "fsq"

    def check(self) -> None:
        """Refuse more codes than ids can count, and channels without a level."""
        count = math.prod(self.levels)
        require(count < 1 << 62, "levels", "numbers with a product below 2^62", self.levels)
        fits = self.project or self.dim == len(self.levels)
        require(fits, "dim", f"{len(self.levels)}, one channel for each of levels, where project is false", self.dim)


class FSQ(Quantizer):
    """z [..., dim] -> ids below prod(levels) and vectors; it has no loss terms.

    The vectors pass the gradient of the bound to the features, and move the linear maps.
    """

    Config = FSQConfig

    def __init__(self, config: FSQConfig) -> None:
        super().__init__()
        self.config = config = checked(config)
        self.codebook_size, self.dim = math.prod(config.levels), config.dim
        count = len(config.levels)
        self.project_in = nn.Linear(config.dim, count) if config.project else None
        self.project_out = nn.Linear(count, config.dim) if config.project else None

    @in_float32
    def quantize(self, z: Tensor) -> Quantized:
        require(z.shape[-1] == self.dim, self.query_names[0], f"float [..., {self.dim}]", z)
        levels = self.config.levels
        narrow, bound = _linear(self.project_in, z), self.config.bound
        whole = round_to_levels(narrow, levels, bound)
        terms = {} if self.training else None
        ids = levels_to_ids(whole, levels)
        margin = lambda: rounding_margin(narrow, levels, bound)  # noqa: E731 (with the names above)
        ids = kernels.finite_ids(z, ids, self.query_names[0], margin, ("project_in", narrow))
        return Quantized(self._expand(whole), ids, terms, queries=z.detach())

    @in_float32
    def look_up(self, ids: Tensor) -> Tensor:
        return self._expand(ids_to_levels(ids, self.config.levels))

    @property
    def revivable(self) -> bool:
        return False

    def set_codes(self, ids: Tensor, vectors: Tensor) -> None:
        raise ValueError("FSQ: expected no revival of codes (it has no codebook), got a request for it")

    def _expand(self, whole: Tensor) -> Tensor:
        """Whole numbers scaled to [-1, 1] and mapped to `dim` channels."""
        return _linear(self.project_out, level_values(whole, self.config.levels, self.config.bound))


def _linear(layer: nn.Linear | None, x: Tensor) -> Tensor:
    """A linear map in the dtype of x, whatever the dtype of its weights; none is the identity."""
    if layer is None:
        return x
    return nn.functional.linear(x, layer.weight.to(x.dtype), layer.bias.to(x.dtype))
