"""A tokenizer's start from statistics of its images: principal components, k-means, regression."""

from dataclasses import dataclass
from typing import Annotated, Any

import torch

from tokenizers_mm._check import require
from tokenizers_mm.config import Range
from tokenizers_mm.data.sources import DataConfig, Mixture
from tokenizers_mm.models.tokenflow import TokenFlow, TokenFlowConfig
from tokenizers_mm.models.tokenflow_start import start_from_images

FIRST = 1 << 40
"""Position of the first image of the start in the run's mixture, far behind all that a run trains on."""


@dataclass(frozen=True)
class WarmStartConfig:
    """images: number of training images. iterations: of k-means. ridge: of the regression, relative to its inputs."""

    images: Annotated[int, Range(1)] = 1024
    iterations: Annotated[int, Range(1)] = 6
    ridge: Annotated[float, Range(0)] = 1e-3


def check_warm_start(config: Any, where: str) -> None:
    """Refuse a model without the linear paths that a warm start fills."""
    fits = isinstance(config, TokenFlowConfig) and config.pixel_encoder.linear != "none" and config.pixel_decoder.linear
    require(fits, where, "a tokenflow model with linear paths in its pixel encoder and decoder", "another model")
    ends = (config.pixel_encoder.out_channels, config.pixel_decoder.in_channels)
    require(set(ends) == {config.quantizer.dims[1]}, where, "as many channels at the heads as the codes have", ends)


def warm_start(tokenizer: TokenFlow, data: DataConfig, seed: int, config: WarmStartConfig) -> None:
    """Fit the linear paths and the codebook of a tokenizer to images of the mixture."""
    mixture = Mixture(data, tokenizer.config.image_size, seed)
    images = torch.stack([mixture[FIRST + index]["image"] for index in range(config.images)])
    start_from_images(tokenizer, images, torch.Generator().manual_seed(seed), config.iterations, config.ridge)
