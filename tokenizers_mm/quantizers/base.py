"""What every quantizer offers: features [..., D] to ids and vectors, and ids back to vectors."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from functools import wraps
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from tokenizers_mm.types import Quantized, VQTerms

Self = TypeVar("Self", bound="Quantizer")


class Quantizer(nn.Module, ABC):
    """Features with the channel last in, `Quantized` out. Nothing in it learns except through gradients.

    Features that hold NaN or infinity are an error; on CUDA, where nothing is read back, their ids are -1, which
    ImageCodes refuses, and their vectors NaN.
    `codebook_size` codes of `dim` channels. All computing is in float32 whatever the autocast state.
    """

    codebook_size: int
    dim: int
    query_names: tuple[str, ...] = ("z",)
    """What errors call the features, one name for each part of their channels."""

    @property
    def revivable(self) -> bool:
        """Whether `set_codes` can move single codes."""
        return True

    @abstractmethod
    def quantize(self, z: Tensor) -> Quantized:
        """Nearest codes of z [..., D]; the terms are computed in training mode only."""

    def prepared(self) -> Callable[[Tensor], Quantized]:
        """`quantize` for several calls in a row while nothing learns: what depends on the codes alone is made once."""
        return self.quantize

    def name_queries(self, *names: str) -> None:
        """Let errors about features name the modules that made them."""
        self.query_names = names

    @abstractmethod
    def look_up(self, ids: Tensor) -> Tensor:
        """Vectors [..., D] of ids [...]; differentiable in the codebook."""

    @abstractmethod
    def set_codes(self, ids: Tensor, vectors: Tensor) -> None:
        """Overwrite the codes `ids` [n] so that they lie at `vectors` [n, D] (the revival of unused codes)."""

    def forward(self, z: Tensor) -> Quantized:
        return self.quantize(z)


def in_float32(method: Callable[..., Any]) -> Callable[..., Any]:
    """Run a method of a quantizer outside autocast, its float tensors as float32 (wider ones stay as they are)."""

    @wraps(method)
    def run(self: Any, first: Tensor, *rest: Any, **options: Any) -> Any:
        with torch.autocast(first.device.type, enabled=False):
            narrow = first.is_floating_point() and first.dtype != torch.float64
            return method(self, first.float() if narrow else first, *rest, **options)

    return run


def mean_terms(parts: Sequence[Quantized]) -> VQTerms | None:
    """Terms averaged over the scales or stages used: equal weight for each, not for each id."""
    terms = [part.terms for part in parts if part.terms is not None]
    if not terms:
        return None
    return VQTerms(
        codebook=torch.stack([t.codebook for t in terms]).mean(),
        commitment=torch.stack([t.commitment for t in terms]).mean(),
        entropy=torch.stack([t.entropy for t in terms]).mean(),
    )
