"""Plain vision transformer at any resolution: learned positions, interpolated to the grid (GLM-Image's tower)."""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from tokenizers_mm._check import require
from tokenizers_mm.config import Cells, Depth, Heads, MLPRatio, Width, checked
from tokenizers_mm.encoders.semantic import ChannelDeviations, ChannelMeans, normalize_image
from tokenizers_mm.functional.positions import bilinear_positions
from tokenizers_mm.layers.attention import Activation, Block, check_block
from tokenizers_mm.layers.conv import Patch
from tokenizers_mm.layers.init import small_normal


@dataclass(frozen=True)
class PlainViTConfig:
    """Sizes of the tower.

    patch: pixels per patch and side. positions: rows and columns of the learned table. norm: a layer norm at the end.
    mean, std: of the image in [0, 1], which is clamped first; None passes the image in [-1, 1] on as it is.
    """

    patch: Patch = 16
    positions: tuple[Cells, Cells] = (128, 128)
    width: Width = 1536
    depth: Depth = 40
    heads: Heads = 16
    mlp_ratio: MLPRatio = 4.0
    activation: Activation = "gelu"
    norm: bool = False
    mean: ChannelMeans | None = None
    std: ChannelDeviations | None = None
    kind: Literal["vit"] = "vit"

    def check(self) -> None:
        """Refuse sizes that no block has, and half of a normalisation."""
        check_block(self.width, self.heads, self.mlp_ratio)
        require((self.mean is None) == (self.std is None), "mean and std", "both or neither", (self.mean, self.std))


class PlainViT(nn.Module):
    """x [B, 3, H, W] in [-1, 1] -> tokens [B, H / patch, W / patch, C]."""

    Config = PlainViTConfig
    EPS = 1e-6
    """Added to the variances of all layer norms."""

    def __init__(self, config: PlainViTConfig) -> None:
        super().__init__()
        self.config = config = checked(config)
        self.dim = width = config.width
        self.embed = nn.Conv2d(3, width, config.patch, stride=config.patch)
        self.positions = nn.Parameter(torch.empty(1, config.positions[0] * config.positions[1], width))
        self.blocks = nn.ModuleList(
            Block(width, config.heads, config.mlp_ratio, config.activation, eps=self.EPS) for _ in range(config.depth)
        )
        self.norm = nn.LayerNorm(width, self.EPS) if config.norm else nn.Identity()
        small_normal([self.positions])

    def forward(self, x: Tensor) -> Tensor:
        h = self.embed(normalize_image(x, self.config.mean, self.config.std)).permute(0, 2, 3, 1)
        grid = (h.shape[1], h.shape[2])
        h = h.flatten(1, 2) + bilinear_positions(self.positions, self.config.positions, grid)
        for block in self.blocks:
            h = block(h)
        return self.norm(h).unflatten(1, grid)
