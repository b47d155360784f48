"""A tokenizer's start from statistics of its images: principal components, k-means, regression. Nothing is drawn at
random but the samples."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tokenizers_mm import kernels
from tokenizers_mm._check import require
from tokenizers_mm.functional.multiscale import area_down, bicubic_up
from tokenizers_mm.models.tokenflow import TokenFlow


@torch.no_grad()
def warm_start(tokenizer: TokenFlow, images: Tensor, seed: int, iterations: int = 8, ridge: float = 1e-3) -> None:
    """Fit the linear paths and the codebook of a tokenizer to images [N, 3, H, W] in [-1, 1].

    The encoder's linear path becomes the principal components of patches, with variance 1 in all together; the codes
    become the centres of k-means over the residuals of every scale; the decoder's linear path the regression of patches
    on the 3x3 neighbourhoods of quantized vectors.
    """
    generator = torch.Generator().manual_seed(seed)
    start_linear(tokenizer, images)
    features = torch.cat([tokenizer.encode_features(part) for part in images.split(64)])
    start_codebook(tokenizer, features, generator, iterations)
    quantized = torch.cat([tokenizer.quantizer.quantize(part).vectors for part in features.split(64)])
    start_decoder(tokenizer, quantized, images, ridge)


def start_linear(tokenizer: TokenFlow, images: Tensor) -> None:
    """The encoder's linear path: principal components of patches; the heads around the codes: the identity."""
    encoder, decoder = tokenizer.pixel_encoder, tokenizer.pixel_decoder
    dim = tokenizer.dims[1]
    require(encoder.linear is not None and decoder.linear is not None, "model", "linear paths", "none")
    require(encoder.config.out_channels == dim, "pixel_encoder.out_channels", str(dim), encoder.config.out_channels)
    assert encoder.linear is not None
    patches = F.pixel_unshuffle(images, encoder.factor).permute(0, 2, 3, 1).flatten(0, 2).double()
    mean = patches.mean(0)
    values, vectors = torch.linalg.eigh((patches - mean).T.cov() if False else torch.cov((patches - mean).T))
    directions = vectors.flip(1)[:, :dim].T
    directions = directions * torch.where(directions.sum(1, keepdim=True) < 0, -1.0, 1.0)
    weight = directions / values.flip(0)[:dim].sum().div(dim).sqrt()
    encoder.linear.weight.copy_(weight.view_as(encoder.linear.weight))
    assert encoder.linear.bias is not None
    encoder.linear.bias.copy_(-weight @ mean)
    for layer in (tokenizer.pixel_head, tokenizer.pixel_embed):
        layer.weight.copy_(torch.eye(dim))
        layer.bias.zero_()


def start_codebook(tokenizer: TokenFlow, features: Tensor, generator: torch.Generator, iterations: int) -> None:
    """Codes: k-means over the residuals that the scales see, twice, as the residuals depend on the codes."""
    quantizer, dims = tokenizer.quantizer, tokenizer.dims
    size = quantizer.codebook_size
    weights = tokenizer.config.quantizer.weights
    roots = torch.cat([torch.full((d,), w**0.5) for d, w in zip(dims, weights, strict=True)])
    residual, pool = features, []
    for grid in quantizer.grids:
        seen = area_down(residual, grid).flatten(0, 2)
        own = kmeans(seen * roots, min(size, len(seen) // 4), generator, 4) / roots
        codes = own[kernels.nearest_code(seen * roots, own * roots)]
        residual = residual - bicubic_up(codes.view(len(features), *grid, -1), quantizer.grids[-1])
        pool.append(seen)
    centres = kmeans(torch.cat(pool) * roots, size, generator, iterations) / roots
    quantizer.set_codes(torch.arange(size), centres)


def kmeans(points: Tensor, count: int, generator: torch.Generator, iterations: int) -> Tensor:
    """Centres [count, D] of points [N, D] by Lloyd's algorithm; a centre without points starts again at a point."""
    centres = points[torch.randperm(len(points), generator=generator)[:count]].clone()
    for _ in range(iterations):
        ids = kernels.nearest_code(points, centres)
        counts = torch.bincount(ids, minlength=count)
        sums = torch.zeros_like(centres).index_add_(0, ids, points)
        fresh = points[torch.randperm(len(points), generator=generator)[:count]]
        centres = torch.where(counts[:, None] > 0, sums / counts.clamp_min(1)[:, None], fresh)
    return centres


def start_decoder(tokenizer: TokenFlow, vectors: Tensor, images: Tensor, ridge: float) -> None:
    """The decoder's linear path: ridge regression of patches on 3x3 neighbourhoods of quantized pixel vectors."""
    decoder = tokenizer.pixel_decoder
    assert decoder.linear is not None
    pixel = vectors[..., tokenizer.dims[0] :].permute(0, 3, 1, 2)
    near = F.unfold(pixel, 3, padding=1).transpose(1, 2).flatten(0, 1).double()
    near = torch.cat([near, torch.ones(len(near), 1, dtype=torch.float64)], 1)
    patches = F.pixel_unshuffle(images, decoder.factor).permute(0, 2, 3, 1).flatten(0, 2).double()
    gram = near.T @ near / len(near)
    gram += ridge * gram.diagonal().mean() * torch.eye(len(gram), dtype=torch.float64)
    solution = torch.linalg.solve(gram, near.T @ patches / len(near)).T
    decoder.linear.weight.copy_(solution[:, :-1].view_as(decoder.linear.weight))
    assert decoder.linear.bias is not None
    decoder.linear.bias.copy_(solution[:, -1])


__all__ = ["kmeans", "nn", "warm_start"]
