"""The noise predictor of one token: an MLP with adaptive norms (DiffLoss; MAR, arXiv 2406.11838, section 3.3)."""

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor, nn

from tokenizers_mm.config import Depth, Width, checked
from tokenizers_mm.functional.diffusion import sinusoid
from tokenizers_mm.layers.init import small_normal, xavier_linears

TIME_DIM = 256


@dataclass(frozen=True)
class TokenDenoiserConfig:
    """Sizes of the network; the defaults are MAR-B's. condition_dim is the width of the MAR decoder."""

    token_dim: Width = 16
    condition_dim: Width = 768
    width: Width = 1024
    depth: Depth = 6


class TokenDenoiser(nn.Module):
    """Noisy tokens [N, D], their steps and condition vectors [N, C] -> [noise | variance] [N, 2 D]."""

    def __init__(self, config: TokenDenoiserConfig) -> None:
        super().__init__()
        self.config = config = checked(config)
        width = config.width
        self.time = nn.Sequential(nn.Linear(TIME_DIM, width), nn.SiLU(), nn.Linear(width, width))
        self.condition = nn.Linear(config.condition_dim, width)
        self.embed = nn.Linear(config.token_dim, width)
        self.blocks = nn.ModuleList(DenoiserBlock(width) for _ in range(config.depth))
        self.modulation = nn.Linear(width, 2 * width)
        self.out = nn.Linear(width, 2 * config.token_dim)
        xavier_linears(self)
        small_normal(layer.weight for layer in self.time if isinstance(layer, nn.Linear))
        for layer in (self.modulation, self.out, *(block.modulation for block in self.blocks)):
            nn.init.zeros_(layer.weight)  # type: ignore[arg-type]

    def forward(self, x: Tensor, t: Tensor, z: Tensor) -> Tensor:
        """One prediction for each row; t [N], or [1] for all rows, counts steps of the learned diffusion."""
        return self.predict(x, t, self.condition(z))

    def predict(self, x: Tensor, t: Tensor, condition: Tensor) -> Tensor:
        """`forward` with the condition already projected, for many steps under one condition."""
        dtype = self.out.weight.dtype
        y = F.silu(self.time(sinusoid(t, TIME_DIM).to(dtype)) + condition)
        h = self.embed(x.to(dtype))
        for block in self.blocks:
            h = block(h, y)
        shift, scale = self.modulation(y).chunk(2, dim=-1)
        return self.out(F.layer_norm(h, h.shape[-1:], eps=1e-6) * (1 + scale) + shift)


class DenoiserBlock(nn.Module):
    """x + gate * mlp(norm(x) * (1 + scale) + shift), the three computed from the condition."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width, eps=1e-6)
        self.mlp = nn.Sequential(nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width))
        self.modulation = nn.Linear(width, 3 * width)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        shift, scale, gate = self.modulation(y).chunk(3, dim=-1)
        return x + gate * self.mlp(self.norm(x) * (1 + scale) + shift)
