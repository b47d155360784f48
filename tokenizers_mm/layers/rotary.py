"""A small transformer over a grid of tokens with rotary positions: DualViTok's semantic head and decoder."""

from dataclasses import dataclass
from typing import Literal

from torch import Tensor, nn

from tokenizers_mm.config import Depth, Heads, MLPRatio, Width, checked
from tokenizers_mm.layers.attention import Block, check_block
from tokenizers_mm.layers.position import grid_positions, rotary_2d

Projection = Literal["linear", "norm_linear", "linear_norm", "mlp"]


@dataclass(frozen=True)
class RotaryTransformerConfig:
    """width must be a multiple of 4 * heads. projection: what follows the blocks; "mlp" is Linear, tanh, Linear."""

    width: Width = 1280
    depth: Depth = 4
    heads: Heads = 16
    mlp_ratio: MLPRatio = 4.0
    projection: Projection = "linear"

    def check(self) -> None:
        """Refuse sizes that no block has."""
        check_block(self.width, self.heads, self.mlp_ratio, divisor=4)


class RotaryTransformer(nn.Module):
    """Tokens [B, h, w, in_dim] -> [B, h, w, out_dim], any grid."""

    def __init__(self, in_dim: int, out_dim: int, config: RotaryTransformerConfig) -> None:
        super().__init__()
        self.config = config = checked(config)
        width, heads = config.width, config.heads
        self.embed = nn.Linear(in_dim, width)
        self.blocks = nn.ModuleList(Block(width, heads, config.mlp_ratio, "quick_gelu") for _ in range(config.depth))
        self.project = nn.Sequential(*_projection(width, out_dim, config.projection))

    def forward(self, x: Tensor) -> Tensor:
        rows, columns = x.shape[1:3]
        rotate = rotary_2d(grid_positions(rows, columns, device=x.device), self.config.width // self.config.heads)
        h = self.embed(x.flatten(1, 2))
        for block in self.blocks:
            h = block(h, rotate)
        return self.project(h).unflatten(1, (rows, columns))


def _projection(width: int, out_dim: int, kind: Projection) -> list[nn.Module]:
    if kind == "mlp":
        return [nn.Linear(width, width), nn.Tanh(), nn.Linear(width, out_dim)]
    linear = nn.Linear(width, out_dim)
    if kind == "norm_linear":
        return [nn.LayerNorm(width), linear]
    return [linear, nn.LayerNorm(out_dim)] if kind == "linear_norm" else [linear]
