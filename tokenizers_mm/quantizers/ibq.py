"""Index backpropagation quantization (IBQ, arXiv 2412.02692) and its variant on unit vectors (X-Omni, GLM-Image).

The code is the one with the largest logit, and the gradient of the vectors reaches every code through the softmax.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tokenizers_mm import kernels
from tokenizers_mm.config import Codes, Range, Width, checked
from tokenizers_mm.functional.assignment import assign, largest_logit, logit_margin
from tokenizers_mm.functional.precision import at_least_float32
from tokenizers_mm.functional.vq import look_up, straight_through, vq_terms
from tokenizers_mm.quantizers.base import Quantizer, in_float32
from tokenizers_mm.types import Quantized

Positive = Annotated[float, Range(0, 1e6, low_open=True)]


@dataclass(frozen=True)
class IBQConfig:
    """codebook_size codes of `dim` channels.

    temperature: logits of the gradient are <z, c> / temperature. normalize: features and codes are compared on the unit
    sphere, with logits -|z - c|^2 / temperature (X-Omni, GvU and GLM-Image: temperature 2). entropy_temperature: of the
    term `entropy`; None leaves it out. diversity: weight of the batch entropy in it.
    """

    codebook_size: Codes
    dim: Width
    temperature: Positive = 1.0
    normalize: bool = False
    entropy_temperature: Positive | None = None
    diversity: Annotated[float, Range(0, 1e6)] = 1.0
    kind: Literal["ibq"] = "ibq"


class IBQ(Quantizer):
    """z [..., D] -> the row with the largest inner product, with the gradient of a softmax over all rows.

    Terms: `assignment`, mean (q - z)^2 of the vectors q themselves, moves features and, through the softmax, all codes;
    `commitment`, mean (sg(c) - z)^2, the features; `codebook`, mean (c - sg(z))^2, the codes chosen; `entropy` both.
    With `normalize`: training returns the rows as they are, evaluation the rows divided by their norms, and `look_up`
    rows as they are, as the original code does; they agree where rows have norm 1. Its z in the terms has norm 1.
    """

    Config = IBQConfig

    def __init__(self, config: IBQConfig) -> None:
        super().__init__()
        self.config = config = checked(config)
        self.codebook_size, self.dim = config.codebook_size, config.dim
        entropy = [] if config.entropy_temperature is None else ["entropy"]
        self.loss_terms = frozenset(["assignment", "commitment", "codebook", *entropy])
        codes = torch.randn(config.codebook_size, config.dim)
        self.codes = nn.Parameter(F.normalize(codes, dim=-1) if config.normalize else codes * config.dim**-0.5)

    def codebook(self) -> Tensor:
        """The codes that `look_up` returns, [K, D]."""
        return at_least_float32(self.codes)

    @in_float32
    def quantize(self, z: Tensor) -> Quantized:
        codes = self.codebook().to(z.dtype)
        keys, raw = codes, z
        if self.config.normalize:
            z, keys = F.normalize(z, dim=-1), F.normalize(codes, dim=-1)
        rows = z.reshape(-1, self.dim)
        if not self.training:
            ids = largest_logit(rows.detach(), keys.detach()).view(z.shape[:-1])
            ids = self._checked(raw, codes, ids, lambda: logit_margin(rows, keys).view(z.shape[:-1]))
            return Quantized(straight_through(z, look_up(keys, ids)), ids, queries=z.detach())
        config, slope = self.config, 2.0 if self.config.normalize else 1.0
        entropy_scale = 0.0 if config.entropy_temperature is None else slope / config.entropy_temperature
        values = codes if config.normalize else None
        found = assign(rows, keys, values, scale=slope / config.temperature, entropy_scale=entropy_scale)
        ids = self._checked(raw, codes, found.ids.view(z.shape[:-1]))
        terms = {"assignment": (found.propagated - rows).square().mean(), **vq_terms(rows, found.rows)}
        if entropy_scale:
            terms["entropy"] = torch.sub(found.sample_entropy, found.batch_entropy, alpha=config.diversity)
        return Quantized(found.propagated.view(z.shape), ids, terms, queries=z.detach())

    def look_up(self, ids: Tensor) -> Tensor:
        return look_up(self.codebook(), ids)

    @torch.no_grad()
    def set_codes(self, ids: Tensor, vectors: Tensor) -> None:
        self.codes[ids] = vectors.to(self.codes.dtype)

    def _checked(self, z: Tensor, codes: Tensor, ids: Tensor, margin: Callable[[], Tensor] | None = None) -> Tensor:
        """The ids, features and codes that are not finite refused."""
        values = codes.detach().flatten()
        spoilt = (values.amin(0) * 0 + values.amax(0) * 0).expand(*ids.shape, 1)  # NaN for NaN or infinity, else 0
        return kernels.finite_ids(z, ids, self.query_names[0], margin, ("codebook", spoilt))
