"""The plain vector quantizer (arXiv 1711.00937), and SimVQ (arXiv 2411.02038): frozen codes behind a linear map."""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from tokenizers_mm import kernels
from tokenizers_mm.config import Codes, Width, checked
from tokenizers_mm.functional.vq import look_up, rotate_to, straight_through, vq_terms
from tokenizers_mm.quantizers.base import Quantizer, in_float32
from tokenizers_mm.types import Quantized


@dataclass(frozen=True)
class VQConfig:
    """codebook_size codes of `dim` channels."""

    codebook_size: Codes
    dim: Width
    kind: Literal["vq"] = "vq"


class VQ(Quantizer):
    """Nearest row of a learned codebook [K, D]."""

    Config = VQConfig
    loss_terms = frozenset(["codebook", "commitment"])

    def __init__(self, config: VQConfig) -> None:
        super().__init__()
        self.config = config = checked(config)
        self.codebook_size, self.dim = config.codebook_size, config.dim
        self.codes = nn.Parameter(torch.randn(config.codebook_size, config.dim) * config.dim**-0.5)

    def codebook(self) -> Tensor:
        """The codes as they are compared and decoded, [K, D]."""
        return self.codes.float()

    @in_float32
    def quantize(self, z: Tensor) -> Quantized:
        return _quantize(z, self.codebook(), self.training, False, self.query_names[0])

    def look_up(self, ids: Tensor) -> Tensor:
        return look_up(self.codebook(), ids)

    @torch.no_grad()
    def set_codes(self, ids: Tensor, vectors: Tensor) -> None:
        self.codes[ids] = vectors.to(self.codes.dtype)


@dataclass(frozen=True)
class SimVQConfig:
    """codebook_size codes of `dim` channels, made from frozen ones of `frozen_dim` (None: the same).

    rotation: pass the gradient to the encoder by the rotation trick, not straight through.
    """

    codebook_size: Codes
    dim: Width
    frozen_dim: Width | None = None
    rotation: bool = False
    kind: Literal["simvq"] = "simvq"


class SimVQ(Quantizer):
    """Nearest row of frozen @ transform.T; only the transform learns."""

    Config = SimVQConfig
    loss_terms = frozenset(["codebook", "commitment"])

    def __init__(self, config: SimVQConfig) -> None:
        super().__init__()
        self.config = config = checked(config)
        self.codebook_size, self.dim = config.codebook_size, config.dim
        frozen_dim = config.frozen_dim or config.dim
        self.register_buffer("frozen", torch.randn(config.codebook_size, frozen_dim) * frozen_dim**-0.5)
        self.transform = nn.Linear(frozen_dim, config.dim, bias=False)

    def codebook(self) -> Tensor:
        """The codes as they are compared and decoded, [K, D]."""
        return self.frozen.float() @ self.transform.weight.float().T  # type: ignore[operator]

    @in_float32
    def quantize(self, z: Tensor) -> Quantized:
        return _quantize(z, self.codebook(), self.training, self.config.rotation, self.query_names[0])

    def look_up(self, ids: Tensor) -> Tensor:
        return look_up(self.frozen.float(), ids) @ self.transform.weight.float().T  # type: ignore[operator]

    @property
    def revivable(self) -> bool:
        return False

    def set_codes(self, ids: Tensor, vectors: Tensor) -> None:
        raise ValueError("SimVQ: expected no revival of codes (its codebook is frozen by design), got a request for it")


def _quantize(z: Tensor, codebook: Tensor, training: bool, rotation: bool, name: str) -> Quantized:
    ids = kernels.nearest_code(z, codebook, name=name)
    vectors = look_up(codebook, ids)
    terms = vq_terms(z, vectors) if training else None
    passed = rotate_to(z, vectors) if rotation else straight_through(z, vectors)
    return Quantized(passed, ids, terms, queries=z.detach())
