"""Vision transformer as a pixel encoder (ViT-VQGAN, arXiv 2110.04627; BSQ-ViT, arXiv 2406.07548)."""

from dataclasses import dataclass
from typing import Literal

from torch import Tensor, nn

from tokenizers_mm.config import checked
from tokenizers_mm.layers.conv import Patch
from tokenizers_mm.layers.patch import PatchTransformer, PatchTransformerConfig


@dataclass(frozen=True)
class PatchEncoderConfig:
    """The transformer, and the pixels per patch and side. Features have the transformer's width."""

    transformer: PatchTransformerConfig
    patch: Patch = 8
    kind: Literal["vit"] = "vit"

    @property
    def factor(self) -> int:
        """Pixels per cell and side."""
        return self.patch

    @property
    def out_channels(self) -> int:
        """Channels of the features."""
        return self.transformer.width


class PatchEncoder(nn.Module):
    """x [B, 3, H, W] in [-1, 1] -> features [B, C, H / patch, W / patch], for the one size of the grid."""

    Config = PatchEncoderConfig

    def __init__(self, config: PatchEncoderConfig) -> None:
        super().__init__()
        self.config = config = checked(config)
        self.factor, width = config.factor, config.transformer.width
        self.embed = nn.Conv2d(3, width, config.patch, stride=config.patch, bias=not config.transformer.norm_in)
        self.transformer = PatchTransformer(config.transformer)

    def forward(self, x: Tensor) -> Tensor:
        return self.transformer(self.embed(x))
