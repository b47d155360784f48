"""Quantization of every channel by itself without training, for frozen features (CubiD, arXiv 2603.19232)."""

from dataclasses import dataclass
from typing import Annotated, Literal

from torch import Tensor

from tokenizers_mm import kernels
from tokenizers_mm._check import require
from tokenizers_mm.config import Range, Width, checked
from tokenizers_mm.functional.precision import at_least_float32
from tokenizers_mm.functional.scalar import level_margin, nearest_level, normal_levels, uniform_levels
from tokenizers_mm.functional.vq import look_up, straight_through
from tokenizers_mm.quantizers.base import Quantizer, in_float32
from tokenizers_mm.types import Quantized


@dataclass(frozen=True)
class PerDimensionConfig:
    """bits of each of `dim` channels, whose values lie in [low, high]; values outside get the outermost level.

    ValueError where it is `checked` unless low is below high.

    levels: "normal", the means of a normal distribution on bins of equal probability, with low and high 3 standard
    deviations from its mean (CubiD: 3 bits, -9 and 9); "uniform", the centres of equal bins.
    """

    dim: Width
    bits: Annotated[int, Range(1, 16)] = 3
    low: float = -9.0
    high: float = 9.0
    levels: Literal["normal", "uniform"] = "normal"
    kind: Literal["per_dimension"] = "per_dimension"

    def check(self) -> None:
        """Refuse an empty range."""
        require(self.low < self.high, "low", f"below high ({self.high})", self.low)


class PerDimension(Quantizer):
    """z [..., dim] -> ids [..., dim] below 2^bits, and the nearest levels as vectors; it has no loss terms.

    The gradient of the vectors is that of z; nothing in it learns.
    """

    Config = PerDimensionConfig

    def __init__(self, config: PerDimensionConfig) -> None:
        super().__init__()
        self.config = config = checked(config)
        self.codebook_size, self.dim, self.groups = 1 << config.bits, config.dim, config.dim
        levels = normal_levels if config.levels == "normal" else uniform_levels
        values = levels(self.codebook_size, config.low, config.high)
        self.register_buffer("values", values.float(), persistent=False)

    @in_float32
    def quantize(self, z: Tensor) -> Quantized:
        require(z.shape[-1] == self.dim, self.query_names[0], f"float [..., {self.dim}]", z)
        assert isinstance(self.values, Tensor)
        values = self.values.to(z.dtype)
        ids = nearest_level(z, values)
        ids = kernels.finite_ids(z[..., None], ids, self.query_names[0], lambda: level_margin(z, values))
        ids = ids if self.groups > 1 else ids[..., 0]
        return Quantized(
            straight_through(z, self.look_up(ids).to(z.dtype)), ids, {} if self.training else None, z.detach()
        )

    def look_up(self, ids: Tensor) -> Tensor:
        ids = ids if self.groups > 1 else ids[..., None]
        return look_up(at_least_float32(self.values)[:, None], ids)[..., 0]  # type: ignore[operator]

    @property
    def revivable(self) -> bool:
        return False

    def set_codes(self, ids: Tensor, vectors: Tensor) -> None:
        raise ValueError("PerDimension: expected no revival of codes (its levels are fixed), got a request for it")
