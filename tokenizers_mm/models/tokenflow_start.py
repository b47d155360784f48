"""A TokenFlow tokenizer's start from statistics of images: principal components, k-means, regression."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tokenizers_mm import kernels
from tokenizers_mm.functional.multiscale import area_down, bicubic_up
from tokenizers_mm.models.tokenflow import TokenFlow


@torch.no_grad()
def start_from_images(tokenizer: TokenFlow, images: Tensor, seed: int, iterations: int, ridge: float) -> None:
    """Fit the linear paths and the codebook to images [N, 3, H, W] in [-1, 1].

    The encoder's linear path becomes the principal components of patches, scaled to mean variance 1; the codes become
    centres of k-means over the residuals of every scale; the decoder's linear path the regression of patches on the 3x3
    neighbourhoods of quantized vectors.
    """
    images = images.to(tokenizer.device)
    start_encoder(tokenizer, images)
    features = torch.cat([tokenizer.encode_features(part) for part in images.split(64)])
    start_codebook(tokenizer, features, seed, iterations)
    vectors = torch.cat([tokenizer.quantizer.quantize(part).vectors for part in features.split(64)])
    start_decoder(tokenizer, vectors, images, ridge)


def start_encoder(tokenizer: TokenFlow, images: Tensor) -> None:
    """Encoder's linear path: principal components of patches. Heads around the codes: the identity."""
    linear, dim = tokenizer.pixel_encoder.linear, tokenizer.dims[1]
    assert linear is not None
    assert linear.bias is not None
    patches = F.pixel_unshuffle(images, tokenizer.pixel_encoder.factor).permute(0, 2, 3, 1).flatten(0, 2).double()
    mean = patches.mean(0)
    variances, directions = torch.linalg.eigh(torch.cov((patches - mean).T))
    variances, directions = variances.flip(0)[:dim], directions.flip(1)[:, :dim].T
    largest = directions.gather(1, directions.abs().argmax(1, keepdim=True))  # eigh leaves the sign open
    weight = directions * largest.sign() / variances.mean().sqrt()
    linear.weight.copy_(weight.view_as(linear.weight))
    linear.bias.copy_(-weight @ mean)
    for head in (tokenizer.pixel_head, tokenizer.pixel_embed):
        nn.init.eye_(head.weight)
        head.bias.zero_()


def start_codebook(tokenizer: TokenFlow, features: Tensor, seed: int, iterations: int) -> None:
    """Codes: centres of the residuals of all scales. The residuals come from centres of each scale by itself."""
    quantizer, weights = tokenizer.quantizer, tokenizer.config.quantizer.weights
    roots = torch.cat([torch.full((dim,), weight**0.5) for dim, weight in zip(tokenizer.dims, weights, strict=True)])
    roots = roots.to(features)
    residual, seen = features, []
    for grid in quantizer.grids:
        points = area_down(residual, grid).flatten(0, 2) * roots
        count = min(quantizer.codebook_size, max(1, len(points) // 4))
        found = kernels.kmeans(points, count, init="random", iterations=2, seed=seed)
        codes = (found.codebook[found.ids] / roots).view(len(features), *grid, -1)
        residual = residual - bicubic_up(codes, quantizer.grids[-1])
        seen.append(points)
    points = torch.cat(seen)
    size = min(quantizer.codebook_size, len(points))
    # From random rows: k-means++ puts many centres on rare patches, and images that were not seen use fewer of them.
    centres = kernels.kmeans(points, size, init="random", iterations=iterations, seed=seed).codebook
    quantizer.set_codes(torch.arange(size, device=points.device), centres / roots)


def start_decoder(tokenizer: TokenFlow, vectors: Tensor, images: Tensor, ridge: float) -> None:
    """Decoder's linear path: ridge regression of patches on 3x3 neighbourhoods of quantized pixel vectors."""
    linear = tokenizer.pixel_decoder.linear
    assert linear is not None
    assert linear.bias is not None
    pixel = vectors[..., tokenizer.dims[0] :].permute(0, 3, 1, 2)
    near = F.unfold(F.pad(pixel, (1, 1, 1, 1), mode="replicate"), 3).transpose(1, 2).flatten(0, 1).double()
    near = torch.cat([near, near.new_ones(len(near), 1)], 1)
    patches = (
        F.pixel_unshuffle(images, tokenizer.pixel_decoder.config.factor).permute(0, 2, 3, 1).flatten(0, 2).double()
    )
    gram = near.T @ near / len(near)
    gram.diagonal().add_(ridge * gram.diagonal().mean())
    solution = torch.linalg.solve(gram, near.T @ patches / len(near)).T
    linear.weight.copy_(solution[:, :-1].view_as(linear.weight))
    linear.bias.copy_(solution[:, -1])
