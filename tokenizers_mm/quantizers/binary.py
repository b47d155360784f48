"""Quantizers without a codebook: the sign of every channel is a bit (LFQ, group-wise LFQ, BSQ).

Bits are packed into ids, `groups` of them per vector; no table of codes exists. Sources: Yu et al., Language Model
Beats Diffusion (MAGVIT-v2, arXiv 2310.05737); Luo et al., Open-MAGVIT2 (arXiv 2409.04410); Xie et al., Show-o
(arXiv 2408.12528); Zhuang et al., WeTok (arXiv 2508.05599); Zhao et al., BSQ (arXiv 2406.07548).
"""

from abc import abstractmethod
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import torch.nn.functional as F
from torch import Tensor

from tokenizers_mm import kernels
from tokenizers_mm._check import require
from tokenizers_mm.config import Range, Width, checked
from tokenizers_mm.functional.bits import (
    MAX_BITS,
    MAX_JOINT_BITS,
    BitOrder,
    bits_to_ids,
    group_entropies,
    ids_to_bits,
    signs,
)
from tokenizers_mm.functional.vq import straight_through, vq_terms
from tokenizers_mm.quantizers.base import Quantizer, in_float32
from tokenizers_mm.types import Quantized

Positive = Annotated[float, Range(0, 1e6, low_open=True)]


@dataclass(frozen=True)
class LFQConfig:
    """dim channels, one bit each, in `groups` ids per vector: consecutive channels, dim / groups bits in each.

    order: which bit of an id the first channel of its group is; lsb_first as Open-MAGVIT2, WeTok and BitDance,
    msb_first as Show-o. entropy: whether to compute the term `entropy`, the mean over groups of the entropy of a
    vector's codes less `diversity` times that of their mean. entropy_bits: bits of a group there; None: those of an id;
    1: every bit by itself (Show-o). temperature: of the codes' softmax(2 <z, c> / temperature); Show-o: 1. eps: added
    to means before their logarithm; Show-o: 1e-8. pool: means are over groups too (WeTok, BitDance). codebook_term:
    compute also the term `codebook`, mean (q - sg(z))^2 with the straight-through q, whose gradient opposes that of
    `commitment` (Show-o).

    Raises: ValueError where `checked` for groups that do not divide dim, and for ids or joint distributions of too many
    bits (62 in an id).
    """

    dim: Width
    groups: Width = 1
    order: BitOrder = "lsb_first"
    entropy: bool = True
    entropy_bits: Width | None = None
    temperature: Positive = 0.01
    diversity: Annotated[float, Range(0, 1e6)] = 1.0
    eps: Annotated[float, Range(0, 1)] = 1e-5
    pool: bool = False
    codebook_term: bool = False
    kind: Literal["lfq"] = "lfq"

    def check(self) -> None:
        """Refuse ids and joint distributions of too many bits."""
        check_bits(self.dim, self.groups, self.entropy, self.entropy_bits)


@dataclass(frozen=True)
class BSQConfig:
    """dim channels, one bit each, in `groups` ids per vector: consecutive channels, dim / groups bits in each.

    normalize: divide features by their norm first. unit: codes have norm 1 (channels of size dim^-1/2), else channels
    are 1 or -1. scale_gradient: the gradient of the vectors is that of the features times the size of their channels
    (bsq-vit), else that of the features (Infinity). order: which bit of an id the first channel of its group is.
    entropy: whether to compute the term `entropy`, the sum over groups of the entropy of a vector's codes less
    `diversity` times that of their mean. entropy_bits: bits of a group there; None: those of an id.
    inverse_temperature: t of softmax(2 t <z, c>).

    Raises: ValueError where `checked`, as `LFQConfig`.
    """

    dim: Width
    groups: Width = 1
    normalize: bool = True
    unit: bool = True
    scale_gradient: bool = True
    order: BitOrder = "msb_first"
    entropy: bool = True
    entropy_bits: Width | None = 1
    inverse_temperature: Positive = 1.0
    diversity: Annotated[float, Range(0, 1e6)] = 1.0
    kind: Literal["bsq"] = "bsq"

    def check(self) -> None:
        """Refuse ids and joint distributions of too many bits."""
        check_bits(self.dim, self.groups, self.entropy, self.entropy_bits)


def check_bits(dim: int, groups: int, entropy: bool, entropy_bits: int | None) -> None:
    """Refuse ids of more than 62 bits, and joint distributions that do not fit into memory."""
    require(dim % groups == 0, "groups", f"a divisor of dim ({dim})", groups)
    require(dim // groups <= MAX_BITS, "groups", f"at most {MAX_BITS} bits in each id", f"{dim // groups} bits")
    bits = dim // groups if entropy_bits is None else entropy_bits
    require(dim % bits == 0, "entropy_bits", f"a divisor of dim ({dim})", bits)
    require(not entropy or bits <= MAX_JOINT_BITS, "entropy_bits", f"at most {MAX_JOINT_BITS}", bits)


class BinaryQuantizer(Quantizer):
    """Vectors are the signs of the features times a size; ids are their bits."""

    size: float = 1.0
    """Absolute value of the channels of vectors."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.config = config = checked(config)
        self.dim, self.groups = config.dim, config.groups
        self.codebook_size = 1 << (config.dim // config.groups)
        self.loss_terms = frozenset(["commitment", *(["entropy"] if config.entropy else [])])

    @abstractmethod
    def terms(self, z: Tensor, vectors: Tensor) -> dict[str, Tensor]:
        """The terms of features z [..., dim] and their straight-through vectors."""

    @in_float32
    def quantize(self, z: Tensor) -> Quantized:
        bits = z.detach() > 0
        ids = bits_to_ids(bits.unflatten(-1, (self.groups, -1)), self.config.order)
        parts = z.detach().unflatten(-1, (self.groups, -1))
        ids = kernels.finite_ids(parts, ids, self.query_names[0], lambda: 2 * parts.abs().amin(-1))
        z = self._compared(z)
        vectors = self._pass(z, signs(z.detach()))
        terms = self.terms(z, vectors) if self.training else None
        return Quantized(vectors, ids if self.groups > 1 else ids[..., 0], terms, queries=z.detach())

    def look_up(self, ids: Tensor) -> Tensor:
        ids = ids if self.groups > 1 else ids[..., None]
        bits = ids_to_bits(ids, self.dim // self.groups, self.config.order).flatten(-2)
        return (bits.float() * 2 - 1) * self.size

    @property
    def revivable(self) -> bool:
        return False

    def set_codes(self, ids: Tensor, vectors: Tensor) -> None:
        kind = type(self).__name__
        raise ValueError(f"{kind}: expected no revival of codes (it has no codebook), got a request for it")

    def _compared(self, z: Tensor) -> Tensor:
        """Features as they are compared with the codes."""
        return z

    def _pass(self, z: Tensor, codes: Tensor) -> Tensor:
        """The value of the codes [..., dim], which are 1 or -1, times their size, with the gradient of the features."""
        return straight_through(z, codes * self.size)

    def _entropies(self, log_odds: Tensor, eps: float, pool: bool = False) -> tuple[Tensor, Tensor]:
        """Entropies of codes and of mean codes by group, where the term is wanted."""
        bits = self.config.entropy_bits or self.dim // self.groups
        return group_entropies(log_odds.reshape(-1, self.dim // bits, bits), pool=pool, eps=eps)


class LFQ(BinaryQuantizer):
    """Lookup-free quantization: z [..., dim] -> signs, 1 where z > 0 and else -1, and their bits as ids.

    The gradient of the vectors is that of z. Both terms move the features alone; nothing in it learns.
    """

    Config = LFQConfig
    config: LFQConfig

    def __init__(self, config: LFQConfig) -> None:
        super().__init__(config)
        if config.codebook_term:
            self.loss_terms |= {"codebook"}

    def terms(self, z: Tensor, vectors: Tensor) -> dict[str, Tensor]:
        terms = vq_terms(z, vectors)
        if not self.config.codebook_term:
            del terms["codebook"]
        if self.config.entropy:
            sample, batch = self._entropies(z * (4 / self.config.temperature), self.config.eps, self.config.pool)
            terms["entropy"] = sample.mean() - (self.config.diversity * batch).mean()
        return terms


class BSQ(BinaryQuantizer):
    """Binary spherical quantization: z [..., dim] -> the nearest corner of the cube inscribed in the unit sphere.

    `commitment` is the mean over vectors of the squared distance (a sum over channels, unlike that of other kinds).
    Both terms move the features alone; nothing in it learns.
    """

    Config = BSQConfig
    config: BSQConfig

    def __init__(self, config: BSQConfig) -> None:
        super().__init__(config)
        self.size = config.dim**-0.5 if config.unit else 1.0

    def terms(self, z: Tensor, vectors: Tensor) -> dict[str, Tensor]:
        terms = {"commitment": (vectors.detach() - z).square().sum(-1).mean()}
        if self.config.entropy:
            sample, batch = self._entropies(z * (4 * self.size * self.config.inverse_temperature), 1e-8)
            terms["entropy"] = (sample - self.config.diversity * batch).sum()
        return terms

    def _compared(self, z: Tensor) -> Tensor:
        return F.normalize(z, dim=-1) if self.config.normalize else z

    def _pass(self, z: Tensor, codes: Tensor) -> Tensor:
        return straight_through(z, codes) * self.size if self.config.scale_gradient else super()._pass(z, codes)
