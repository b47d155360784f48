"""Residual quantization over scales with any quantizer inside (VAR, arXiv 2404.02905; TokenFlow; Infinity)."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Annotated, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tokenizers_mm._check import require
from tokenizers_mm.config import Range, Share, checked
from tokenizers_mm.functional.multiscale import Grid, Upsampling, area_down, nearest_tick, upsample
from tokenizers_mm.functional.vq import straight_through, vq_terms
from tokenizers_mm.quantizers.base import Quantizer, in_float32, mean_terms
from tokenizers_mm.types import Quantized


@dataclass(frozen=True)
class SmoothingConfig:
    """Convolutions after the upsampling, VAR's phi: x * (1 - ratio) + convolution(x) * ratio.

    count: convolutions, shared by scales with near places; 0: one for each scale. kernel: its size; ValueError unless
    it is odd.
    """

    count: Annotated[int, Range(0, 256)] = 4
    ratio: Share = 0.5
    kernel: Annotated[int, Range(1, 15)] = 3

    def check(self) -> None:
        """Refuse kernels without a centre."""
        require(self.kernel % 2 == 1, "kernel", "an odd number", self.kernel)


@dataclass(frozen=True)
class ScalesConfig:
    """Settings for joining scales.

    upsampling of codes to the full grid: bicubic (VAR, TokenFlow) or bilinear (Infinity). smoothing: convolutions after
    it, or none. learning: "by_scale", every scale's quantizer has its own terms and passes its gradient to the features
    (TokenFlow, Infinity); "by_sum", the sum of codes up to each scale is compared with the features, and the gradient
    of the vectors is that of the features (VAR).
    """

    upsampling: Upsampling = "bicubic"
    smoothing: SmoothingConfig | None = None
    learning: Literal["by_scale", "by_sum"] = "by_scale"


VAR_SCALES = ScalesConfig(smoothing=SmoothingConfig(), learning="by_sum")
"""As VAR has it."""

INFINITY_SCALES = ScalesConfig(upsampling="bilinear")
"""As Infinity has it, with BSQ inside."""


class Smoothing(nn.Module):
    """x [B, h, w, D] mixed with its convolution, one of several by the place of the scale."""

    def __init__(self, dim: int, num_scales: int, config: SmoothingConfig) -> None:
        super().__init__()
        self.num_scales, self.ratio = num_scales, config.ratio
        count = config.count or num_scales
        size = config.kernel
        self.convolutions = nn.ModuleList(nn.Conv2d(dim, dim, size, padding=size // 2) for _ in range(count))

    def forward(self, x: Tensor, scale: int) -> Tensor:
        place = scale / max(1, self.num_scales - 1)
        layer: nn.Conv2d = self.convolutions[nearest_tick(place, len(self.convolutions))]  # type: ignore[assignment]
        weight, bias = layer.weight.to(x.dtype), layer.bias.to(x.dtype)  # type: ignore[union-attr]
        mixed = F.conv2d(x.permute(0, 3, 1, 2), weight, bias, padding=layer.padding).permute(0, 2, 3, 1)  # type: ignore[arg-type]
        return x * (1 - self.ratio) + mixed * self.ratio


class MultiScaleQuantizer(Quantizer):
    """z [B, h, w, D] on the last of `grids` -> ids [B, L(, groups)], coarse to fine, and vectors [B, h, w, D].

    At each scale the residual is averaged down, quantized, and the codes, upsampled, are taken from it; the vectors are
    the sum of the upsampled codes. The codebook is shared by all scales.

    Raises: ValueError for no grid at all.
    """

    def __init__(self, quantizer: Quantizer, grids: Sequence[Grid], scales: ScalesConfig | None = None) -> None:
        super().__init__()
        require(len(grids) > 0, "grids", "at least one grid", "none")
        self.scales = checked(ScalesConfig() if scales is None else scales, "scales")
        self.quantizer = quantizer
        self.grids = tuple((int(rows), int(columns)) for rows, columns in grids)
        self.codebook_size, self.dim, self.groups = quantizer.codebook_size, quantizer.dim, quantizer.groups
        self.loss_terms = quantizer.loss_terms
        if self.scales.learning == "by_sum":
            self.loss_terms |= {"codebook", "commitment"}
        smoothing = self.scales.smoothing
        self.smoothing = None if smoothing is None else Smoothing(self.dim, len(self.grids), smoothing)

    def name_queries(self, *names: str) -> None:
        super().name_queries(*names)
        self.quantizer.name_queries(*names)

    @in_float32
    def quantize(self, z: Tensor, keep: Sequence[int] | None = None) -> Quantized:
        """Codes of z [B, h, w, D], scale by scale.

        keep: indices of the scales to use (scale drop in training); None uses all.
        Raises: ValueError for another grid than the last scale's.
        """
        last = self.grids[-1]
        require(z.ndim == 4 and z.shape[1:3] == last, "z", f"[B, {last[0]}, {last[1]}, {self.dim}]", z)
        by_sum = self.scales.learning == "by_sum"
        residual, total, sums = z.detach() if by_sum else z, torch.zeros_like(z), []
        quantize, parts = self.quantizer.prepared(), []
        for index in range(len(self.grids)) if keep is None else keep:
            part = quantize(area_down(residual, self.grids[index]))
            codes = self.quantizer.look_up(part.ids) if by_sum and self.training else part.vectors
            up = self._enlarge(codes, index)
            total, residual = total + up, residual - up.detach()
            parts.append(part)
            sums.append(total)
        terms = mean_terms(parts)
        if by_sum:
            total = straight_through(z, total)
            terms = None if terms is None else {**terms, **_sum_terms(z, sums)}
        ids = torch.cat([part.ids.flatten(1, 2) for part in parts], dim=1)
        queries = [part.queries.flatten(1, 2) for part in parts if part.queries is not None]
        return Quantized(total, ids, terms, torch.cat(queries, dim=1) if queries else None)

    def look_up(self, ids: Tensor) -> Tensor:
        """Vectors [B, h, w, D] of ids [B, L(, groups)]; L may end after any whole scale."""
        return self.partial_sums(ids)[-1]

    @in_float32
    def partial_sums(self, ids: Tensor) -> list[Tensor]:
        """Sums [B, h, w, D] of the upsampled codes up to each of the scales of ids [B, L(, groups)].

        Raises: ValueError for ids that end inside of a scale.
        """
        ends = list(accumulate(rows * columns for rows, columns in self.grids))
        require(ids.shape[1] in ends, "ids", "a whole number of scales", ids)
        vectors = self.quantizer.look_up(ids)
        ups = [
            self._enlarge(vectors[:, end - rows * columns : end].unflatten(1, (rows, columns)), index)
            for index, ((rows, columns), end) in enumerate(zip(self.grids, ends, strict=True))
            if end <= ids.shape[1]
        ]
        return list(accumulate(ups))

    def next_inputs(self, ids: Tensor) -> Tensor:
        """Inputs of a model that predicts scale after scale (VAR, Infinity), [B, L - l, D], l ids in the first scale.

        ids [B, L(, groups)], all scales; each scale but the first reads the sum so far, averaged down to its grid.
        """
        pairs = zip(self.partial_sums(ids), self.grids[1:], strict=False)
        return torch.cat([area_down(total, grid).flatten(1, 2) for total, grid in pairs], dim=1)

    @torch.no_grad()
    @in_float32
    def self_correcting(self, z: Tensor, corrupt: Callable[[Tensor, int], Tensor]) -> tuple[Tensor, Tensor]:
        """Labels and inputs of next-scale training whose history holds mistakes (self-correction, Infinity 3.4).

        z [B, h, w, D]. corrupt: maps the ids [B, r, c(, groups)] of a scale and its index to those that the history
        gets (`functional.bits.flip_bits` for bits). Labels are the codes of what the corrupted history left over.

        Returns: ids [B, L(, groups)], and inputs [B, L - l, D]: the history, interpolated to each scale but the first.
        """
        total, labels, inputs = torch.zeros_like(z), [], []
        for index, grid in enumerate(self.grids):
            if index:
                inputs.append(upsample(total, grid, self.scales.upsampling).flatten(1, 2))
            ids = self.quantizer.quantize(area_down(z - total, grid)).ids
            labels.append(ids.flatten(1, 2))
            total = total + self._enlarge(self.quantizer.look_up(corrupt(ids, index)), index)
        return torch.cat(labels, dim=1), torch.cat(inputs, dim=1) if inputs else z.new_zeros(len(z), 0, self.dim)

    @property
    def revivable(self) -> bool:
        return self.quantizer.revivable

    def set_codes(self, ids: Tensor, vectors: Tensor) -> None:
        self.quantizer.set_codes(ids, vectors)

    def _enlarge(self, codes: Tensor, index: int) -> Tensor:
        """Codes [B, r, c, D] of a scale on the full grid."""
        up = upsample(codes, self.grids[-1], self.scales.upsampling)
        return up if self.smoothing is None else self.smoothing(up, index)


def _sum_terms(z: Tensor, sums: Sequence[Tensor]) -> dict[str, Tensor]:
    """Means over scales: `codebook` moves the codes, of this scale and those before, `commitment` the features."""
    terms = [vq_terms(z, total) for total in sums]
    return {name: torch.stack([each[name] for each in terms]).mean() for name in terms[0]}
