"""The vision tower of Qwen2-VL (arXiv 2409.12191, section 2.1) for single pictures, batched over pictures of one size.

Frozen: no parameter asks for a gradient. Every picture attends to itself only, so memory grows with one picture's
tokens squared and not with the batch's.
"""

from dataclasses import dataclass
from typing import Annotated

import torch.nn.functional as F
from torch import Tensor, nn

from tokenizers_mm._check import fail
from tokenizers_mm.config import Depth, Heads, MLPRatio, Range, Width, checked
from tokenizers_mm.encoders.semantic import CLIP_MEAN, CLIP_STD
from tokenizers_mm.functional.precision import at_least_float32
from tokenizers_mm.layers.attention import Activation, Block, check_block
from tokenizers_mm.layers.position import block_order, grid_positions, rotary_2d


@dataclass(frozen=True)
class Qwen2ViTConfig:
    """Sizes of the tower; the defaults are those of the 7B model.

    out_dim: channels after the merger, which joins `merge` x `merge` patches. frames: of the patch embedding; a picture
    is shown that many times.
    """

    width: Width = 1280
    depth: Depth = 32
    heads: Heads = 16
    out_dim: Width = 3584
    mlp_ratio: MLPRatio = 4.0
    activation: Activation = "quick_gelu"
    patch: Annotated[int, Range(1, 256)] = 14
    merge: Annotated[int, Range(1, 16)] = 2
    frames: Annotated[int, Range(1, 16)] = 2

    @property
    def cell(self) -> int:
        """Pixels per token and side."""
        return self.patch * self.merge

    def check(self) -> None:
        """Refuse sizes that no block has."""
        check_block(self.width, self.heads, self.mlp_ratio, divisor=4)


class Qwen2ViT(nn.Module):
    """x [B, 3, H, W] in [-1, 1] and a size (multiples of patch * merge) -> tokens [B, h, w, out_dim]."""

    def __init__(self, config: Qwen2ViTConfig) -> None:
        super().__init__()
        self.config = config = checked(config)
        self.cell = config.cell
        kernel = (config.frames, config.patch, config.patch)
        self.embed = nn.Conv3d(3, config.width, kernel, stride=kernel, bias=False)
        self.blocks = nn.ModuleList(
            Block(config.width, config.heads, config.mlp_ratio, config.activation) for _ in range(config.depth)
        )
        self.norm = nn.LayerNorm(config.width, eps=1e-6)
        joined = config.width * config.merge**2
        self.merger = nn.Sequential(nn.Linear(joined, joined), nn.GELU(), nn.Linear(joined, config.out_dim))
        self.requires_grad_(False)

    def prepare(self, x: Tensor, size: tuple[int, int]) -> Tensor:
        """The input of the tower: x resized (bicubic, antialiased) in at least float32, in [0, 1], normalised."""
        x = F.interpolate((at_least_float32(x) + 1) / 2, size=size, mode="bicubic", align_corners=False, antialias=True)
        mean, std = (x.new_tensor(values).view(1, 3, 1, 1) for values in (CLIP_MEAN, CLIP_STD))
        return (x.clamp(0, 1) - mean) / std

    def forward(self, x: Tensor, size: tuple[int, int]) -> Tensor:
        if size[0] % self.cell or size[1] % self.cell:
            fail("size", f"multiples of {self.cell}", size)
        patch, merge = self.config.patch, self.config.merge
        rows, columns = size[0] // patch, size[1] // patch
        kernel = self.embed.weight.sum(2)  # all frames are the same picture
        h = F.conv2d(self.prepare(x, size).to(kernel.dtype), kernel, stride=patch)
        h = block_order(h.permute(0, 2, 3, 1), merge)
        positions = grid_positions(rows, columns, merge, h.device)
        rotate = rotary_2d(positions, self.config.width // self.config.heads)
        for block in self.blocks:
            h = block(h, rotate)
        joined = self.norm(h).unflatten(1, (-1, merge**2)).flatten(2)
        return self.merger(joined).unflatten(1, (rows // merge, columns // merge))
