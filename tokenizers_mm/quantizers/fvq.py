"""FVQ: a transformer over the whole codebook, VQBridge, that is removed after training (arXiv 2509.10140)."""

from dataclasses import dataclass
from typing import Annotated, Literal

import torch
from torch import Tensor, nn

from tokenizers_mm._check import require
from tokenizers_mm.config import Codes, Depth, Heads, Range, Width, checked
from tokenizers_mm.functional.precision import at_least_float32
from tokenizers_mm.layers.attention import Block, check_block
from tokenizers_mm.layers.init import xavier_linears
from tokenizers_mm.quantizers.vq import VQ, CodebookQuantizer, VQConfig


@dataclass(frozen=True)
class FVQConfig:
    """codebook_size codes of `dim` channels.

    group: codes that the transformer reads as one token of `width` channels, a divisor of codebook_size; depth, heads:
    of the transformer, width a multiple of heads. Others are a ValueError where it is `checked`.
    """

    codebook_size: Codes
    dim: Width
    group: Annotated[int, Range(1, 1 << 16)] = 16
    width: Width = 256
    depth: Depth = 2
    heads: Heads = 4
    kind: Literal["fvq"] = "fvq"

    def check(self) -> None:
        """Refuse groups that do not divide the codebook."""
        require(self.codebook_size % self.group == 0, "group", f"a divisor of {self.codebook_size}", self.group)
        check_block(self.width, self.heads)


class FVQ(CodebookQuantizer):
    """Nearest row of recover(blocks(compress(codes))): every code moves in every step, with those of its group.

    `folded()` is a plain `VQ` with the same codes. The last linear map starts random (the published code starts it at
    zero, where all codes are one point and the nearest one is decided by ties).
    """

    Config = FVQConfig

    def __init__(self, config: FVQConfig) -> None:
        super().__init__()
        self.config = config = checked(config)
        self.codebook_size, self.dim = config.codebook_size, config.dim
        self.codes = nn.Parameter(torch.randn(config.codebook_size, config.dim) * config.dim**-0.5)
        self.compress = nn.Linear(config.group * config.dim, config.width)
        self.blocks = nn.ModuleList(
            Block(config.width, config.heads, activation="gelu_tanh") for _ in range(config.depth)
        )
        self.norm = nn.LayerNorm(config.width, eps=1e-6, elementwise_affine=False)
        self.recover = nn.Linear(config.width, config.group * config.dim)
        xavier_linears(self)

    def codebook(self) -> Tensor:
        x = self.compress(self.codes.view(1, -1, self.config.group * self.dim))
        for block in self.blocks:
            x = block(x)
        return at_least_float32(self.recover(self.norm(x))).view(self.codebook_size, self.dim)

    @torch.no_grad()
    def folded(self) -> VQ:
        """The plain quantizer with the codes as they are now; ids and vectors stay the same."""
        plain = VQ(VQConfig(self.codebook_size, self.dim)).to(self.codes.device)
        plain.codes.copy_(self.codebook())
        return plain.train(self.training)

    @property
    def revivable(self) -> bool:
        return False

    def set_codes(self, ids: Tensor, vectors: Tensor) -> None:
        raise ValueError("FVQ: expected no revival of codes (all are moved together), got a request for it")
