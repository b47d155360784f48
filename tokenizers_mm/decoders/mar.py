"""The MAR decoder: mask tokens join the encoder's output (Li et al., MAR, arXiv 2406.11838, section 4)."""

from dataclasses import dataclass
from typing import Annotated

import torch
from torch import Tensor, nn

from tokenizers_mm._check import require
from tokenizers_mm.config import Cells, Depth, Heads, MLPRatio, Range, Share, Width, checked
from tokenizers_mm.functional.masking import positions_where, put
from tokenizers_mm.functional.positions import bilinear_positions
from tokenizers_mm.layers.attention import Block, check_block
from tokenizers_mm.layers.init import small_normal, xavier_linears


@dataclass(frozen=True)
class MARDecoderConfig:
    """Sizes of the decoder; the defaults are MAR-B's. grid and num_buffers are those of the encoder."""

    encoder_width: Width = 768
    width: Width = 768
    depth: Depth = 12
    heads: Heads = 12
    mlp_ratio: MLPRatio = 4.0
    grid: tuple[Cells, Cells] = (16, 16)
    num_buffers: Annotated[int, Range(0, 1 << 16)] = 64
    dropout: Share = 0.1

    def check(self) -> None:
        """Refuse sizes that no block has."""
        check_block(self.width, self.heads, self.mlp_ratio)


class MARDecoder(nn.Module):
    """The encoder's output [B, num_buffers + n, C] -> a vector z [B, h * w, width] for every token, known or not."""

    def __init__(self, config: MARDecoderConfig) -> None:
        super().__init__()
        self.config = config = checked(config)
        width, length = config.width, config.grid[0] * config.grid[1]
        self.embed = nn.Linear(config.encoder_width, width)
        self.mask_token = nn.Parameter(torch.empty(1, 1, width))
        self.positions = nn.Parameter(torch.empty(1, config.num_buffers + length, width))
        self.out_positions = nn.Parameter(torch.empty(1, length, width))
        self.blocks = nn.ModuleList(
            Block(width, config.heads, config.mlp_ratio, dropout=config.dropout) for _ in range(config.depth)
        )
        self.norm = nn.LayerNorm(width, eps=1e-6)
        xavier_linears(self)
        small_normal([self.mask_token, self.positions, self.out_positions])

    def position_tables(self, grid: tuple[int, int]) -> tuple[Tensor, Tensor]:
        """Positions [1, num_buffers + h * w, C] before the blocks and [1, h * w, C] after them."""
        native = self.config.grid
        return bilinear_positions(self.positions, native, grid), bilinear_positions(self.out_positions, native, grid)

    def forward(self, encoded: Tensor, grid: tuple[int, int], mask: Tensor) -> Tensor:
        """mask: boolean [B, h * w], True for the tokens that the encoder did not see."""
        count, length = self.config.num_buffers, grid[0] * grid[1]
        require(mask.shape == (len(encoded), length), "mask", f"bool [{len(encoded)}, {length}]", mask)
        visible = positions_where(~mask)
        expected = (len(encoded), count + visible.shape[1], self.config.encoder_width)
        require(encoded.shape == expected, "encoded", f"float {list(expected)}", encoded)
        x = self.embed(encoded)
        tokens = self.mask_token.to(x.dtype).expand(len(x), length, -1)
        before, after = self.position_tables(grid)
        x = torch.cat([x[:, :count], put(tokens, visible, x[:, count:])], dim=1) + before
        for block in self.blocks:
            x = block(x)
        return self.norm(x)[:, count:] + after
