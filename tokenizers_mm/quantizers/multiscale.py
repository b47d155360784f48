"""Residual quantization over scales with any quantizer inside (TokenFlow's MSVQ; VAR, arXiv 2404.02905)."""

from collections.abc import Sequence
from functools import reduce
from itertools import accumulate
from operator import add

import torch
from torch import Tensor

from tokenizers_mm._check import require
from tokenizers_mm.functional.multiscale import Grid, area_down, bicubic_up
from tokenizers_mm.quantizers.base import Quantizer, in_float32, mean_terms
from tokenizers_mm.types import Quantized


class MultiScaleQuantizer(Quantizer):
    """z [B, h, w, D] on the last of `grids` -> ids [B, L(, groups)], coarse to fine, and vectors [B, h, w, D].

    At each scale the residual is averaged down, quantized, and the codes, upsampled, are taken from it; the vectors are
    the sum of the upsampled codes. The codebook is shared by all scales.
    """

    def __init__(self, quantizer: Quantizer, grids: Sequence[Grid]) -> None:
        super().__init__()
        require(len(grids) > 0, "grids", "at least one grid", "none")
        self.quantizer = quantizer
        self.grids = tuple((int(rows), int(columns)) for rows, columns in grids)
        self.codebook_size, self.dim, self.groups = quantizer.codebook_size, quantizer.dim, quantizer.groups
        self.loss_terms = quantizer.loss_terms

    def name_queries(self, *names: str) -> None:
        super().name_queries(*names)
        self.quantizer.name_queries(*names)

    @in_float32
    def quantize(self, z: Tensor, keep: Sequence[int] | None = None) -> Quantized:
        """`keep` lists the scales to use (scale drop in training); None uses all."""
        last = self.grids[-1]
        require(z.ndim == 4 and z.shape[1:3] == last, "z", f"[B, {last[0]}, {last[1]}, {self.dim}]", z)
        residual, total = z, torch.zeros_like(z)
        quantize, parts = self.quantizer.prepared(), []
        for index in range(len(self.grids)) if keep is None else keep:
            part = quantize(area_down(residual, self.grids[index]))
            up = bicubic_up(part.vectors, last)
            total, residual = total + up, residual - up.detach()
            parts.append(part)
        ids = torch.cat([part.ids.flatten(1, 2) for part in parts], dim=1)
        queries = [part.queries.flatten(1, 2) for part in parts if part.queries is not None]
        return Quantized(total, ids, mean_terms(parts), torch.cat(queries, dim=1) if queries else None)

    @in_float32
    def quantize_corrected(self, z: Tensor, strength: float, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Ids with mistakes that later scales correct, for training a model that draws scale by scale.

        Returns (read, learned), int64 [B, L] each: at every scale `learned` are the ids of what is left, and `read`
        those of the same with noise of `strength` times its spread, as a model that drew wrongly would have them; the
        scales after it quantize what `read` leaves. Source: NextFlow (arXiv 2601.02204), self-correction.
        """
        residual, quantize = z, self.quantizer.prepared()
        read, learned = [], []
        for grid in self.grids:
            left = area_down(residual, grid)
            noise = torch.randn(left.shape, generator=generator).to(left.device)
            drawn = quantize(left + strength * left.std() * noise)
            read.append(drawn.ids.flatten(1, 2))
            learned.append(quantize(left).ids.flatten(1, 2))
            residual = residual - bicubic_up(drawn.vectors, self.grids[-1])
        return torch.cat(read, dim=1), torch.cat(learned, dim=1)

    def look_up(self, ids: Tensor) -> Tensor:
        """Vectors [B, h, w, D] of ids [B, L(, groups)]; L may end after any whole scale."""
        ends = list(accumulate(rows * columns for rows, columns in self.grids))
        require(ids.shape[1] in ends, "ids", "a whole number of scales", ids)
        vectors, last = self.quantizer.look_up(ids), self.grids[-1]
        scales = [
            vectors[:, end - rows * columns : end].unflatten(1, (rows, columns))
            for (rows, columns), end in zip(self.grids, ends, strict=True)
            if end <= ids.shape[1]
        ]
        return reduce(add, (bicubic_up(part, last) for part in scales))

    @property
    def revivable(self) -> bool:
        return self.quantizer.revivable

    def set_codes(self, ids: Tensor, vectors: Tensor) -> None:
        self.quantizer.set_codes(ids, vectors)
