"""The MAR encoder: buffer slots and the visible tokens through a ViT (Li et al., MAR, arXiv 2406.11838, section 4).

Read without a mask it is Harmon's encoder for understanding (arXiv 2503.21979, section 3).
"""

from dataclasses import dataclass
from typing import Annotated

import torch
from torch import Tensor, nn

from tokenizers_mm._check import require
from tokenizers_mm.config import Cells, Depth, Heads, MLPRatio, Range, Share, Width, checked
from tokenizers_mm.functional.masking import positions_where, take
from tokenizers_mm.functional.positions import bilinear_positions
from tokenizers_mm.layers.attention import Block, check_block
from tokenizers_mm.layers.init import small_normal, xavier_linears


@dataclass(frozen=True)
class MAREncoderConfig:
    """Sizes of the encoder; the defaults are MAR-B's.

    token_dim: channels of a latent. grid: rows and columns that the position table is learned on; other grids
    interpolate it. num_buffers: slots before the tokens that carry the condition.
    """

    token_dim: Width = 16
    width: Width = 768
    depth: Depth = 12
    heads: Heads = 12
    mlp_ratio: MLPRatio = 4.0
    grid: tuple[Cells, Cells] = (16, 16)
    num_buffers: Annotated[int, Range(0, 1 << 16)] = 64
    num_classes: Annotated[int, Range(1, 1 << 24)] = 1000
    dropout: Share = 0.1

    def check(self) -> None:
        """Refuse sizes that no block has."""
        check_block(self.width, self.heads, self.mlp_ratio)


class MAREncoder(nn.Module):
    """Row-major tokens [B, h * w, D] -> [B, num_buffers + n, C]: buffers, then the n visible tokens in order."""

    def __init__(self, config: MAREncoderConfig) -> None:
        super().__init__()
        self.config = config = checked(config)
        width = config.width
        self.embed = nn.Linear(config.token_dim, width)
        self.embed_norm = nn.LayerNorm(width, eps=1e-6)
        self.classes = nn.Embedding(config.num_classes, width)
        self.no_class = nn.Parameter(torch.empty(1, width))
        self.positions = nn.Parameter(torch.empty(1, config.num_buffers + config.grid[0] * config.grid[1], width))
        self.blocks = nn.ModuleList(
            Block(width, config.heads, config.mlp_ratio, dropout=config.dropout) for _ in range(config.depth)
        )
        self.norm = nn.LayerNorm(width, eps=1e-6)
        xavier_linears(self)
        small_normal([self.classes.weight, self.no_class, self.positions])

    def condition(self, labels: Tensor) -> Tensor:
        """Condition vectors [B, C] of classes int64 [B]; -1 stands for no class."""
        require(labels.ndim == 1 and labels.dtype == torch.int64, "labels", "int64 [B]", labels)
        low, high = int(labels.min()), int(labels.max())
        last = self.config.num_classes - 1
        require(low >= -1 and high <= last, "labels", f"values from -1 to {last}", f"values from {low} to {high}")
        known = (labels >= 0)[:, None]
        return torch.where(known, self.classes(labels.clamp_min(0)), self.no_class)

    def position_table(self, grid: tuple[int, int]) -> Tensor:
        """Positions [1, num_buffers + h * w, C] of a grid."""
        return bilinear_positions(self.positions, self.config.grid, grid)

    def forward(
        self, tokens: Tensor, grid: tuple[int, int], mask: Tensor | None = None, condition: Tensor | None = None
    ) -> Tensor:
        """Encode the tokens that `mask` (boolean [B, h * w], True for hidden) leaves visible; all without one.

        condition: vectors [B, C] or one [1, C] that fill the buffers; by default the embedding of no class.
        """
        batch, length = check_tokens(tokens, grid, self.config.token_dim)
        buffers = self.no_class if condition is None else condition
        x = self.embed(tokens)
        buffers = buffers[:, None].to(x.dtype).expand(batch, self.config.num_buffers, -1)
        x = self.embed_norm(torch.cat([buffers, x], dim=1) + self.position_table(grid))
        if mask is not None:
            require(mask.shape == (batch, length), "mask", f"bool [{batch}, {length}]", mask)
            count = self.config.num_buffers
            x = torch.cat([x[:, :count], take(x[:, count:], positions_where(~mask))], dim=1)
        for block in self.blocks:
            x = block(x)
        return self.norm(x)


def check_tokens(tokens: Tensor, grid: tuple[int, int], dim: int) -> tuple[int, int]:
    """Refuse tokens that are not [B, h * w, dim]; returns B and h * w."""
    length = grid[0] * grid[1]
    fits = tokens.ndim == 3 and tokens.shape[1:] == (length, dim)
    require(fits, "tokens", f"float [B, {length}, {dim}] for a grid of {grid[0]} x {grid[1]}", tokens)
    return tokens.shape[0], length
