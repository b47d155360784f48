"""The vision tower of Qwen2-VL (arXiv 2409.12191, section 2.1) for single pictures, batched over pictures of one size.

Frozen: no parameter asks for a gradient. Every picture attends to itself only, so memory grows with one picture's
tokens squared and not with the batch's.
"""

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor, nn

from tokenizers_mm._check import fail, require
from tokenizers_mm.encoders.semantic import CLIP_MEAN, CLIP_STD
from tokenizers_mm.layers.attention import Block
from tokenizers_mm.layers.position import block_order, grid_positions, rotary_2d


@dataclass(frozen=True)
class Qwen2ViTConfig:
    """Sizes of the tower; the defaults are those of the 7B model.

    out_dim: channels after the merger, which joins `merge` x `merge` patches. frames: of the patch embedding; a picture
    is shown that many times.
    """

    width: int = 1280
    depth: int = 32
    heads: int = 16
    out_dim: int = 3584
    mlp_ratio: float = 4.0
    activation: str = "quick_gelu"
    patch: int = 14
    merge: int = 2
    frames: int = 2


class Qwen2ViT(nn.Module):
    """x [B, 3, H, W] in [-1, 1] and a size (multiples of patch * merge) -> tokens [B, h, w, out_dim]."""

    def __init__(self, config: Qwen2ViTConfig) -> None:
        super().__init__()
        head = 4 * config.heads
        require(config.width % head == 0, "width", f"a multiple of {head} (4 * heads)", config.width)
        self.config = config
        self.cell = config.patch * config.merge
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
        """What the tower sees: x resized (bicubic, antialiased, float32), in [0, 1], normalised as CLIP's images."""
        x = F.interpolate((x.float() + 1) / 2, size=size, mode="bicubic", align_corners=False, antialias=True)
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
