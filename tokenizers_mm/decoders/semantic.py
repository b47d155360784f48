"""Semantic decoder: semantic codes back to the teacher's feature space (BEiT v2, arXiv 2208.06366, section 2.2)."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from tokenizers_mm.config import Cells, Depth, Heads, Width, checked
from tokenizers_mm.layers.attention import Block, check_block


@dataclass(frozen=True)
class SemanticDecoderConfig:
    """grid: rows and columns of the codes; out_dim: channels of the teacher's features."""

    grid: tuple[Cells, Cells]
    out_dim: Width
    width: Width = 768
    depth: Depth = 3
    heads: Heads = 12

    def check(self) -> None:
        """Refuse sizes that no block has."""
        check_block(self.width, self.heads)


class SemanticDecoder(nn.Module):
    """z [B, h, w, D] -> features [B, h * w, out_dim]: a small ViT with learned positions, and a head."""

    def __init__(self, in_dim: int, config: SemanticDecoderConfig) -> None:
        super().__init__()
        self.config = config = checked(config)
        rows, columns = config.grid
        self.embed = nn.Linear(in_dim, config.width)
        self.class_token = nn.Parameter(torch.zeros(1, 1, config.width))
        self.positions = nn.Parameter(torch.empty(1, 1 + rows * columns, config.width))
        nn.init.trunc_normal_(self.positions, std=0.02)
        self.blocks = nn.ModuleList(Block(config.width, config.heads) for _ in range(config.depth))
        self.norm = nn.LayerNorm(config.width, eps=1e-6)
        self.head = nn.Sequential(
            nn.Linear(config.width, config.width), nn.Tanh(), nn.Linear(config.width, config.out_dim)
        )

    def forward(self, z: Tensor) -> Tensor:
        x = self.embed(z.flatten(1, 2))
        x = torch.cat([self.class_token.expand(len(x), -1, -1), x], 1) + self.positions
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x[:, 1:]))
