"""Ids of a multi-scale tokenizer against the original's, where a near tie may fall on either side."""

import torch
from torch import Tensor

from tokenizers_mm.functional.multiscale import area_down, bicubic_up
from tokenizers_mm.models import TokenFlow

TIE = 5e-5
"""Distances closer than this may come out either way: the limit of the cases' README, 7 times float32 noise."""


@torch.no_grad()
def assert_same_ids(tokenizer: TokenFlow, features: Tensor, expected: Tensor) -> int:
    """Scale by scale, going on from the expected ids; the number of near ties that fell on the other side."""
    residual, start, flips = features, 0, 0
    quantizer, grids = tokenizer.quantizer.quantizer, tokenizer.config.scales
    codebook = quantizer.look_up(torch.arange(tokenizer.quantizer.codebook_size)).double()
    for grid in grids:
        query = area_down(residual, grid)
        wanted = expected[:, start : start + grid[0] * grid[1]].unflatten(1, grid)
        start += wanted[0].numel()
        found = quantizer.quantize(query)
        wrong = found.ids != wanted
        z = torch.cat(
            [torch.nn.functional.normalize(part.double(), dim=-1) for part in query[wrong].split([32, 8], -1)], -1
        )
        ours, theirs = ((z - codebook[ids[wrong]]).square().sum(-1) for ids in (found.ids, wanted))
        assert bool(((theirs - ours).abs() < TIE).all()), f"scale {grid}: {int(wrong.sum())} ids differ"
        flips += int(wrong.sum())
        residual = residual - bicubic_up(quantizer.look_up(wanted), grids[-1])
    assert start == expected.shape[1]
    return flips
