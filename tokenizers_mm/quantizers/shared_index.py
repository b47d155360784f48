"""Two (or more) codebooks with one shared index per position: the quantizer of TokenFlow (arXiv 2412.03069)."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Annotated, Literal

import torch
from torch import Tensor, nn

from tokenizers_mm import kernels
from tokenizers_mm._check import require
from tokenizers_mm.config import Codes, Length, Range, Width, checked
from tokenizers_mm.functional.precision import at_least_float32
from tokenizers_mm.functional.shared_index import normalize_parts
from tokenizers_mm.functional.vq import codebook_entropy, look_up, straight_through, vq_terms
from tokenizers_mm.quantizers.base import Quantizer, in_float32
from tokenizers_mm.types import Quantized


@dataclass(frozen=True)
class SharedIndexConfig:
    """codebook_size codes; `dims` channels of each part; `weights` of their squared distances.

    normalize: compare directions only; every part of queries and codes is divided by its norm.
    entropy_temperature: of the entropy term in training; None leaves the term out (zero).

    Raises: ValueError where `checked` for weights that are not one per part, or all 0.
    """

    codebook_size: Codes
    dims: Annotated[tuple[Width, ...], Length(1, 64)] = (32, 8)
    weights: Annotated[tuple[Annotated[float, Range(0, 1e6)], ...], Length(1, 64)] = (1.0, 1.0)
    normalize: bool = True
    entropy_temperature: Annotated[float, Range(0, 1e6, low_open=True)] | None = None
    kind: Literal["shared_index"] = "shared_index"

    @property
    def dim(self) -> int:
        """Channels of all parts."""
        return sum(self.dims)

    def check(self) -> None:
        """Refuse weights that do not belong to the parts."""
        require(len(self.dims) == len(self.weights), "weights", f"{len(self.dims)} numbers", self.weights)
        require(any(self.weights), "weights", "one above 0", self.weights)


class SharedIndexQuantizer(Quantizer):
    """z [..., sum(dims)] -> the id [...] whose parts are nearest in the weighted sum of squared distances.

    Source: TokenFlow (arXiv 2412.03069), eq. 2.
    """

    Config = SharedIndexConfig

    def __init__(self, config: SharedIndexConfig) -> None:
        super().__init__()
        self.config = config = checked(config)
        self.codebook_size, self.dim = config.codebook_size, config.dim
        entropy = [] if config.entropy_temperature is None else ["entropy"]
        self.loss_terms = frozenset(["codebook", "commitment", *entropy])
        bound = 1.0 / config.codebook_size
        parts = [torch.empty(config.codebook_size, dim).uniform_(-bound, bound) for dim in config.dims]
        self.query_names = ("z",) * len(config.dims)
        self.codebooks = nn.ParameterList(nn.functional.normalize(part, dim=-1) for part in parts)

    def name_queries(self, *names: str) -> None:
        """One name for each part, or one for all."""
        super().name_queries(*(names * len(self.config.dims) if len(names) == 1 else names))

    def codebook(self) -> Tensor:
        """The codes as they are compared and decoded, [K, D], in float32."""
        codes = torch.cat([at_least_float32(part) for part in self.codebooks], dim=-1)
        return self._normalized(codes)

    @in_float32
    def quantize(self, z: Tensor) -> Quantized:
        return self._quantize(z, self.codebook())

    def prepared(self) -> Callable[[Tensor], Quantized]:
        return partial(self._quantize, codebook=self.codebook(), trust_version=True)

    @in_float32
    def _quantize(self, z: Tensor, codebook: Tensor, trust_version: bool = False) -> Quantized:
        z, dims = self._normalized(z), self.config.dims
        ids = kernels.nearest_code_shared(
            z.split(dims, -1),
            codebook.split(dims, -1),
            self.config.weights,
            trust_version=trust_version,
            names=self.query_names,
        )
        vectors = look_up(codebook, ids)
        terms = {**vq_terms(z, vectors), **self._entropy(z, codebook)} if self.training else None
        return Quantized(straight_through(z, vectors), ids, terms, queries=z.detach())

    def look_up(self, ids: Tensor) -> Tensor:
        return look_up(self.codebook(), ids)

    @torch.no_grad()
    def set_codes(self, ids: Tensor, vectors: Tensor) -> None:
        for codebook, part in zip(self.codebooks, vectors.split(self.config.dims, -1), strict=True):
            codebook[ids] = part.to(codebook.dtype)

    def _normalized(self, x: Tensor) -> Tensor:
        return normalize_parts(x, self.config.dims) if self.config.normalize else x

    def _entropy(self, z: Tensor, codebook: Tensor) -> dict[str, Tensor]:
        if self.config.entropy_temperature is None:
            return {}
        root = torch.cat(
            [z.new_full((dim,), w**0.5) for dim, w in zip(self.config.dims, self.config.weights, strict=True)]
        )
        scaled = (z * root).flatten(0, -2), codebook * root
        return {"entropy": codebook_entropy(*scaled, self.config.entropy_temperature)}
