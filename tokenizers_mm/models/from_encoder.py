"""A tokenizer from any vision encoder of timm or transformers: its codes are found, and only a pixel decoder learns.

In Python, and then a training run of the decoder with objective.model.start_from: start and trainable:
[embed, pixel_decoder]; or in one run, configs/encoder_codes.yaml (timm) and encoder_codes_dinov2.yaml (transformers):

    tokenizer = tmm.tokenizer_from("vit_small_patch16_dinov3", images, codebook_size=16384, pretrained=True)
    tokenizer = tmm.tokenizer_from("facebook/dinov2-small", images, codebook_size=16384)
    tokenizer.save("start")
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tokenizers_mm import kernels
from tokenizers_mm._check import require
from tokenizers_mm.config import checked
from tokenizers_mm.decoders.pixel import PixelDecoderConfig
from tokenizers_mm.encoders.semantic import SemanticEncoder, SemanticEncoderConfig
from tokenizers_mm.encoders.vision_model import VisionModel, copy_tokens, describe_model, published
from tokenizers_mm.models.semantic import SemanticConfig, SemanticTokenizer
from tokenizers_mm.quantizers import PerDimensionConfig, VQConfig

MAX_VECTORS = 1 << 18
"""Limit of the features that are clustered; they are spread evenly over the images."""


def tokenizer_from(
    name: Any,
    images: Tensor | Iterable[Tensor],
    *,
    codebook_size: int | None = 16384,
    bits: int = 3,
    pretrained: bool = False,
    options: Mapping[str, Any] | None = None,
    decoder: PixelDecoderConfig | None = None,
    iterations: int = 25,
    seed: int = 0,
) -> SemanticTokenizer:
    """A tokenizer of a frozen vision encoder: exact codes of its features, and a pixel decoder with random weights.

    name: of a timm model; a hub id ("owner/name") or the directory of a vision model of transformers, with its weights;
        or such a model, or its configuration (random weights) itself. See `encoders.vision_model.MODELS` for the kinds.
    pretrained, options: of a timm model, take its published weights (its hub or cache), and see `TowerOptions`.
    images: one batch or several, [B, 3, H, W] in [-1, 1], all of the one size that the tokenizer will take.
    codebook_size: the codes are the centres of so many clusters of the features. None: every channel is quantized by
        itself into `bits` bits between the mean less and plus 3 standard deviations of all values.
    decoder: its factor must be the pixels per token; by default see `default_decoder`.
    iterations, seed: of k-means.

    Returns: the tokenizer, in evaluation mode; the tower does not learn.
    Raises: ValueError for an encoder of no known kind, images of another size, and fewer features than codes.
    """
    first, batches = _peek([images] if isinstance(images, Tensor) else images)
    size = (first.shape[-2], first.shape[-1])
    if not isinstance(name, str) or "/" in name or Path(name).is_dir():
        given = {"options": options, "pretrained": pretrained}
        require(not options and not pretrained, "options and pretrained", "nothing with such a model", given)
        tower = _transformers_tower(name)
    else:
        tower = SemanticEncoder(_tower_config(name, size, dict(options or {}), pretrained)).eval()
        if pretrained:
            tower.load_pretrained()
    vectors, cell = _collect(tower, batches, size)
    if codebook_size is None:
        mean, spread = float(vectors.mean()), 3 * float(vectors.std())
        quantizer: Any = PerDimensionConfig(tower.dim, bits, mean - spread, mean + spread)
    else:
        quantizer = VQConfig(codebook_size, tower.dim)
    pixels = decoder or default_decoder(cell, tower.dim)
    config = checked(SemanticConfig(tower.config, quantizer, cell, size, pixel_decoder=pixels, head=False))
    tokenizer = SemanticTokenizer.from_config(config)
    tokenizer.tower.load_state_dict(tower.state_dict())
    if codebook_size is not None:
        cluster_codes(tokenizer, vectors, iterations, seed)
    return tokenizer.eval()


def cluster_codes(tokenizer: SemanticTokenizer, vectors: Tensor, iterations: int, seed: int) -> None:
    """Make the codes the centres of k-means over features [N, D] as the quantizer takes them."""
    count = tokenizer.quantizer.codebook_size
    found = kernels.kmeans(vectors, count, iterations=iterations, seed=seed).codebook
    tokenizer.quantizer.set_codes(torch.arange(count, device=found.device), found)


def default_decoder(cell: int, in_channels: int) -> PixelDecoderConfig:
    """A decoder with the factor `cell`: as many levels as it can be halved, and depth-to-space for the rest."""
    levels, patch = 1, cell
    while patch % 2 == 0 and levels < 5:
        levels, patch = levels + 1, patch // 2
    widths = tuple(min(4, 2**index) for index in range(levels))
    return PixelDecoderConfig(
        in_channels, channels=64, multipliers=widths, num_blocks=1, attention_levels=(), head_patch=patch
    )


def _tower_config(name: str, size: tuple[int, int], options: dict[str, Any], pretrained: bool) -> SemanticEncoderConfig:
    """The tower with its own normalisation, as timm states it, for images of this size."""
    import timm  # heavy: loaded when a tower is built, not with the package

    require(name in timm.list_models(), "name", "the name of a timm model (timm.list_models)", name)
    published = timm.get_pretrained_cfg(name)
    config = SemanticEncoderConfig(name, options, pretrained)
    if published is not None:
        config = replace(config, mean=tuple(published.mean), std=tuple(published.std))
    if "img_size" in options or not _takes_size(name):
        return config
    return replace(config, options={"img_size": size, **options})


def _transformers_tower(model: Any) -> VisionModel:
    """The tower of a model of transformers, with its weights and its own normalisation."""
    statistics = None
    if isinstance(model, str):
        model, statistics = published(model)
    config = describe_model(model)
    if statistics is not None:
        config = replace(config, mean=statistics[0], std=statistics[1])
    tower = VisionModel(config).eval()
    if model is not getattr(model, "config", model):  # a model, not the configuration of one
        copy_tokens(model, tower)
    return tower


def _takes_size(name: str) -> bool:
    """True if the architecture is a vision transformer, built for one size of image."""
    return name.startswith(("vit_", "deit", "eva", "beit", "samvit", "naflexvit"))


def _peek(batches: Iterable[Tensor]) -> tuple[Tensor, Iterator[Tensor]]:
    """The first batch, and all of them."""
    iterator = iter(batches)
    first = next(iterator, None)
    require(first is not None and first.ndim == 4, "images", "float [B, 3, H, W]", first)
    assert first is not None

    def rest() -> Iterator[Tensor]:
        yield first
        yield from iterator

    return first, rest()


@torch.no_grad()
def _collect(tower: nn.Module, batches: Iterable[Tensor], size: tuple[int, int]) -> tuple[Tensor, int]:
    """Features [N, C] of the images, N at most `MAX_VECTORS`, and the pixels of a token per side."""
    parts, cells = [], set()
    for batch in batches:
        require(tuple(batch.shape[-2:]) == size, "images", f"images of {size[0]} x {size[1]} pixels", batch)
        for x in batch.split(16):
            tokens = tower(x)
            cells.add((size[0] / tokens.shape[1], size[1] / tokens.shape[2]))
            parts.append(tokens.flatten(0, 2).float())
    vectors = torch.cat(parts)
    cell = min(cells)[0]
    square = len(cells) == 1 and cells == {(cell, cell)} and cell == int(cell)
    require(square, "name", "an encoder with square tokens of whole pixels", sorted(cells))
    if len(vectors) > MAX_VECTORS:
        vectors = vectors[torch.linspace(0, len(vectors) - 1, MAX_VECTORS).round().long()]
    return vectors, int(cell)
