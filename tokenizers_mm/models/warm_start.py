"""A tokenizer's start from statistics of images: principal components, k-means, regression."""

from dataclasses import dataclass
from typing import Annotated, Any

import torch
from torch import Tensor

from tokenizers_mm._check import require
from tokenizers_mm.config import Range
from tokenizers_mm.models.from_encoder import cluster_codes
from tokenizers_mm.models.semantic import SemanticConfig, SemanticTokenizer
from tokenizers_mm.models.tokenflow import TokenFlow, TokenFlowConfig
from tokenizers_mm.models.tokenflow_start import start_from_images


@dataclass(frozen=True)
class WarmStartConfig:
    """images: number of training images. iterations: of k-means. ridge: of the regression, relative to its inputs."""

    images: Annotated[int, Range(1)] = 1024
    iterations: Annotated[int, Range(1)] = 6
    ridge: Annotated[float, Range(0)] = 1e-3


def check_warm_start(config: Any, options: WarmStartConfig, where: str) -> None:
    """Refuse a model without the linear paths or the codes of a tower that a warm start fills, and options unused."""
    if isinstance(config, SemanticConfig):
        plain = config.quantizer.kind == "vq" and not config.head
        require(plain, where, "a semantic model with quantizer.kind: vq and head: false", config.quantizer.kind)
        none = options.ridge == WarmStartConfig.ridge
        require(none, f"{where}.ridge", "nothing for a semantic model (there is no regression)", options.ridge)
        return
    fits = isinstance(config, TokenFlowConfig) and config.pixel_encoder.linear != "none" and config.pixel_decoder.linear
    require(fits, where, "a tokenflow model with linear paths in its pixel encoder and decoder", "another model")
    ends = (config.pixel_encoder.out_channels, config.pixel_decoder.in_channels)
    require(set(ends) == {config.quantizer.dims[1]}, where, "as many channels at the heads as the codes have", ends)


@torch.no_grad()
def warm_start(tokenizer: Any, images: Tensor, config: WarmStartConfig, seed: int) -> None:
    """Fit a tokenizer to images [N, 3, H, W] in [-1, 1]: TokenFlow's linear paths and codebook (`start_from_images`),
    or the codes of a semantic tokenizer, which become the centres of k-means over the features of its tower.

    tokenizer: one whose configuration `check_warm_start` takes.
    """
    if isinstance(tokenizer, SemanticTokenizer):
        features = [tokenizer.tower_features(part.to(tokenizer.device)).flatten(0, 2) for part in images.split(64)]
        cluster_codes(tokenizer, torch.cat(features), config.iterations, seed)
    else:
        assert isinstance(tokenizer, TokenFlow)
        start_from_images(tokenizer, images, seed, config.iterations, config.ridge)
