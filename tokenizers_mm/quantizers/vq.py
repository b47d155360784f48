"""Nearest row of a codebook: the plain vector quantizer (arXiv 1711.00937) and SimVQ (arXiv 2411.02038)."""

from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Annotated, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tokenizers_mm import kernels
from tokenizers_mm.config import Codes, Range, Width, checked
from tokenizers_mm.functional.precision import at_least_float32
from tokenizers_mm.functional.vq import codebook_entropy, look_up, rotate_to, straight_through, vq_terms
from tokenizers_mm.quantizers.base import Quantizer, in_float32
from tokenizers_mm.types import Quantized


class CodebookQuantizer(Quantizer):
    """Nearest row of `codebook()`.

    The vectors pass their gradient to the features, straight through or by the rotation trick (`rotation`). The term
    `codebook` moves what the codes are made of, `commitment` the features.
    """

    rotation = False
    loss_terms = frozenset(["codebook", "commitment"])

    @abstractmethod
    def codebook(self) -> Tensor:
        """The codes as they are compared and decoded, [K, D], in float32."""

    @in_float32
    def quantize(self, z: Tensor) -> Quantized:
        return self._quantize(z, self.codebook())

    def prepared(self) -> Callable[[Tensor], Quantized]:
        # A copy: only what nobody else can write to is searched again without a look at its content.
        return partial(self._quantize, codebook=self.codebook().clone(), trust_version=True)

    @in_float32
    def look_up(self, ids: Tensor) -> Tensor:
        return look_up(self.codebook(), ids)

    @in_float32
    def _quantize(self, z: Tensor, codebook: Tensor, trust_version: bool = False) -> Quantized:
        z = self._compared(z)
        ids = self._nearest(z, codebook, trust_version)
        vectors = look_up(codebook, ids)
        terms = self._terms(z, vectors, codebook) if self.training else None
        passed = rotate_to(z, vectors) if self.rotation else straight_through(z, vectors)
        return Quantized(passed, ids, terms, queries=z.detach())

    def _compared(self, z: Tensor) -> Tensor:
        """Features as they are compared with the codes."""
        return z

    def _nearest(self, z: Tensor, codebook: Tensor, trust_version: bool) -> Tensor:
        return kernels.nearest_code(z, codebook, trust_version=trust_version, name=self.query_names[0])

    def _terms(self, z: Tensor, vectors: Tensor, codebook: Tensor) -> dict[str, Tensor]:
        return vq_terms(z, vectors)


@dataclass(frozen=True)
class VQConfig:
    """codebook_size codes of `dim` channels.

    distance: "l2"; "unit", features and codes are divided by their norms before anything else (ViT-VQGAN, LlamaGen,
    UniTok); "cosine", the code with the nearest direction, as it is (VAR's znorm). rotation: pass the gradient to the
    encoder by the rotation trick, not straight through. entropy_temperature: of the entropy term in training; None
    leaves the term out.
    """

    codebook_size: Codes
    dim: Width
    distance: Literal["l2", "unit", "cosine"] = "l2"
    rotation: bool = False
    entropy_temperature: Annotated[float, Range(0, 1e6, low_open=True)] | None = None
    kind: Literal["vq"] = "vq"


class VQ(CodebookQuantizer):
    """Nearest row of a learned codebook [K, D]."""

    Config = VQConfig

    def __init__(self, config: VQConfig) -> None:
        super().__init__()
        self.config = config = checked(config)
        self.codebook_size, self.dim, self.rotation = config.codebook_size, config.dim, config.rotation
        if config.entropy_temperature is not None:
            self.loss_terms |= {"entropy"}
        self.codes = nn.Parameter(torch.randn(config.codebook_size, config.dim) * config.dim**-0.5)

    def codebook(self) -> Tensor:
        return self._compared(at_least_float32(self.codes))

    @torch.no_grad()
    def set_codes(self, ids: Tensor, vectors: Tensor) -> None:
        self.codes[ids] = vectors.to(self.codes.dtype)

    def _compared(self, z: Tensor) -> Tensor:
        return F.normalize(z, dim=-1) if self.config.distance == "unit" else z

    def _nearest(self, z: Tensor, codebook: Tensor, trust_version: bool) -> Tensor:
        if self.config.distance != "cosine":
            return super()._nearest(z, codebook, trust_version)
        options = {"normalize": True, "trust_version": trust_version, "names": self.query_names}
        return kernels.nearest_code_shared((z,), (codebook,), (1.0,), **options)

    def _terms(self, z: Tensor, vectors: Tensor, codebook: Tensor) -> dict[str, Tensor]:
        terms, temperature = vq_terms(z, vectors), self.config.entropy_temperature
        if temperature is None:
            return terms
        if self.config.distance == "cosine":
            z, codebook = F.normalize(z, dim=-1), F.normalize(codebook, dim=-1)
        return {**terms, "entropy": codebook_entropy(z.reshape(-1, self.dim), codebook, temperature)}


@dataclass(frozen=True)
class SimVQConfig:
    """codebook_size codes of `dim` channels, made from frozen ones of `frozen_dim` (None: the same).

    rotation: pass the gradient to the encoder by the rotation trick, not straight through. bias: the map of the frozen
    codes adds one.
    """

    codebook_size: Codes
    dim: Width
    frozen_dim: Width | None = None
    rotation: bool = False
    bias: bool = False
    kind: Literal["simvq"] = "simvq"


class SimVQ(CodebookQuantizer):
    """Nearest row of frozen @ transform.T (+ bias); only the transform learns."""

    Config = SimVQConfig

    def __init__(self, config: SimVQConfig) -> None:
        super().__init__()
        self.config = config = checked(config)
        self.codebook_size, self.dim, self.rotation = config.codebook_size, config.dim, config.rotation
        frozen_dim = config.frozen_dim or config.dim
        self.register_buffer("frozen", torch.randn(config.codebook_size, frozen_dim) * frozen_dim**-0.5)
        self.transform = nn.Linear(frozen_dim, config.dim, bias=config.bias)

    def codebook(self) -> Tensor:
        return self._transformed(at_least_float32(self.frozen))  # type: ignore[arg-type]

    @in_float32
    def look_up(self, ids: Tensor) -> Tensor:
        return self._transformed(look_up(at_least_float32(self.frozen), ids))  # type: ignore[arg-type]

    @property
    def revivable(self) -> bool:
        return False

    def set_codes(self, ids: Tensor, vectors: Tensor) -> None:
        raise ValueError("SimVQ: expected no revival of codes (its codebook is frozen by design), got a request for it")

    def _transformed(self, frozen: Tensor) -> Tensor:
        mapped = frozen @ at_least_float32(self.transform.weight).T
        return mapped if self.transform.bias is None else mapped + at_least_float32(self.transform.bias)
