"""Interface of every quantizer: features [..., D] to ids and vectors, and ids back to vectors."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from functools import wraps
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from tokenizers_mm.types import Quantized, Stream


class Quantizer(nn.Module, ABC):
    """Features with the channel last in, `Quantized` out. Nothing in it learns except through gradients.

    Features that hold NaN or infinity are an error; on CUDA, where nothing is read back, their ids are -1, which
    ImageCodes refuses, and their vectors NaN.
    All computing is in float32 whatever the autocast state.

    Config: a frozen dataclass with a `kind` and `dim`. codebook_size: number of codes of one id. dim: channels. groups:
    ids per vector; with several, ids are [..., groups]. loss_terms: names of the terms of `quantize` in training mode.
    """

    Config: ClassVar[type]
    codebook_size: int
    dim: int
    groups: int = 1
    loss_terms: frozenset[str] = frozenset()
    query_names: tuple[str, ...] = ("z",)
    """Names of the features in errors, one for each part of their channels."""

    @property
    def revivable(self) -> bool:
        """True if `set_codes` can move single codes."""
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

    def look_up_joined(self, ids: Tensor, grid: tuple[int, int] | None = None) -> Tensor:
        """Vectors of ids [B, groups * L] as `join_groups` joins them. grid: rows and columns of L; None for scales."""
        parts = split_groups(ids, self.groups)
        return self.look_up(parts if grid is None else parts.unflatten(1, grid))

    @abstractmethod
    def set_codes(self, ids: Tensor, vectors: Tensor) -> None:
        """Overwrite the codes `ids` [n] so that they lie at `vectors` [n, D] (the revival of unused codes).

        Code k of group g has the id g * codebook_size + k.
        """

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


QUANTIZERS: dict[str, type[Quantizer]] = {}
"""Quantizer classes by the `kind` of their configuration; `tokenizers_mm.quantizers` fills it.

A field of a configuration that takes every kind: `quantizer: Annotated[Any, Choice(QUANTIZERS, "vq")]`.
"""


def build_quantizer(config: Any) -> Quantizer:
    """The quantizer of a configuration, with random codes."""
    return QUANTIZERS[config.kind](config)  # type: ignore[call-arg]


def make_streams(name: str, quantizer: Quantizer, grids: Sequence[tuple[int, int]]) -> tuple[Stream, ...]:
    """Streams of the ids of a quantizer: one, or one for each of its groups, named `name0`, `name1`, ..."""
    names = [name] if quantizer.groups == 1 else [f"{name}{group}" for group in range(quantizer.groups)]
    return tuple(Stream(each, quantizer.codebook_size, tuple(grids)) for each in names)


def join_groups(ids: Tensor, groups: int) -> Tensor:
    """Ids [B, n] or [B, n, groups] as [B, groups * n], one group after the other: the order of `make_streams`."""
    return ids if groups == 1 else ids.transpose(1, 2).flatten(1)


def split_groups(ids: Tensor, groups: int) -> Tensor:
    """The inverse of `join_groups`."""
    return ids if groups == 1 else ids.unflatten(1, (groups, -1)).transpose(1, 2)


def mean_terms(parts: Sequence[Quantized]) -> Mapping[str, Tensor] | None:
    """Terms averaged over the scales or stages used: equal weight for each, not for each id."""
    terms = [part.terms for part in parts if part.terms is not None]
    if not terms:
        return None
    return {name: torch.stack([each[name] for each in terms]).mean() for name in terms[0]}
