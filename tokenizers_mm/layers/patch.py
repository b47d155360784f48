"""Plain vision transformer over a fixed grid of patches (ViT-VQGAN, arXiv 2110.04627; BSQ-ViT, arXiv 2406.07548)."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from tokenizers_mm.config import Cells, Depth, Heads, MLPRatio, Width, checked
from tokenizers_mm.layers.attention import Block, check_block
from tokenizers_mm.layers.init import small_normal


@dataclass(frozen=True)
class PatchTransformerConfig:
    """Sizes of the blocks.

    grid: rows and columns of patches; the learned positions fix it. norm_in: a layer norm before the first block.
    """

    grid: tuple[Cells, Cells]
    width: Width = 768
    depth: Depth = 12
    heads: Heads = 12
    mlp_ratio: MLPRatio = 4.0
    norm_in: bool = True

    def check(self) -> None:
        """Refuse sizes that no block has."""
        check_block(self.width, self.heads, self.mlp_ratio)


class PatchTransformer(nn.Module):
    """x [B, C, h, w] on the grid -> [B, C, h, w]: learned positions, norm, blocks, norm."""

    EPS = 1e-5
    """Added to the variances of all layer norms."""

    def __init__(self, config: PatchTransformerConfig) -> None:
        super().__init__()
        self.config = config = checked(config)
        self.positions = nn.Parameter(torch.empty(config.grid[0] * config.grid[1], config.width))
        self.norm_in = nn.LayerNorm(config.width, self.EPS) if config.norm_in else nn.Identity()
        self.blocks = nn.ModuleList(
            Block(config.width, config.heads, config.mlp_ratio, eps=self.EPS) for _ in range(config.depth)
        )
        self.norm = nn.LayerNorm(config.width, self.EPS)
        small_normal([self.positions])

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm_in(x.flatten(2).transpose(1, 2) + self.positions)
        for block in self.blocks:
            x = block(x)
        return self.norm(x).transpose(1, 2).unflatten(2, self.config.grid)
