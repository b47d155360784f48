"""Discriminators for adversarial training."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm

from tokenizers_mm._check import require
from tokenizers_mm.config import Keys, Length, Range, checked
from tokenizers_mm.layers.towers import ChannelDeviations, ChannelMeans, TowerName, TowerOptions, create_tower


@dataclass(frozen=True)
class PatchGANConfig:
    """channels of the first layer, `num_layers` stride-2 layers. norm "batch" is the published one; "none" is exact
    under gradient accumulation."""

    channels: Annotated[int, Range(1, 1 << 12)] = 64
    num_layers: Annotated[int, Range(1, 16)] = 3
    norm: Literal["batch", "none"] = "batch"
    kind: Literal["patchgan"] = "patchgan"


@dataclass(frozen=True)
class DINOConfig:
    """A frozen timm ViT whose tokens, after some of its blocks, small heads judge.

    name, options, pretrained: of the tower, as in the semantic encoder; mean, std: of its images in [0, 1]. blocks:
    numbers of the blocks that are read, from 0. kernel: tokens, in row-major order, that a head's residual layer sees.
    """

    kind: Literal["dino"] = "dino"
    name: TowerName = "vit_small_patch16_224.dino"
    options: Annotated[dict[str, Any], Keys(TowerOptions)] = field(default_factory=dict)
    pretrained: bool = True
    mean: ChannelMeans = (0.485, 0.456, 0.406)
    std: ChannelDeviations = (0.229, 0.224, 0.225)
    blocks: Annotated[tuple[Annotated[int, Range(0, 255)], ...], Length(1, 64)] = (2, 5, 8, 11)
    kernel: Annotated[int, Range(1, 255)] = 9

    def check(self) -> None:
        """Refuse a kernel without a middle."""
        require(self.kernel % 2 == 1, "kernel", "an odd number", self.kernel)


class PatchGAN(nn.Module):
    """x [B, 3, H, W] -> logits [B, 1, h, w], one per patch (Isola et al., arXiv 1611.07004, section 3.2)."""

    Config = PatchGANConfig

    def __init__(self, config: PatchGANConfig) -> None:
        super().__init__()
        layers: list[nn.Module] = [nn.Conv2d(3, config.channels, 4, stride=2, padding=1), nn.LeakyReLU(0.2)]
        width = config.channels
        for index in range(1, config.num_layers + 1):
            wider = config.channels * min(2**index, 8)
            stride = 2 if index < config.num_layers else 1
            plain = config.norm == "none"
            layers.append(nn.Conv2d(width, wider, 4, stride=stride, padding=1, bias=plain))
            layers += [] if plain else [nn.BatchNorm2d(wider)]
            layers.append(nn.LeakyReLU(0.2))
            width = wider
        layers.append(nn.Conv2d(width, 1, 4, padding=1))
        self.layers = nn.Sequential(*layers)
        self.apply(_init)

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


def _init(module: nn.Module) -> None:
    if isinstance(module, nn.Conv2d):
        nn.init.normal_(module.weight, 0.0, 0.02)
    elif isinstance(module, nn.BatchNorm2d):
        nn.init.normal_(module.weight, 1.0, 0.02)


class DINODiscriminator(nn.Module):
    """x [B, 3, H, W] -> logits [B, blocks * N], one per token of every block that is read.

    The tower stays frozen and in evaluation mode; images are resized (bilinear) to its size. Each head is a pointwise
    layer, a residual layer over neighbouring tokens and a linear map, spectrally normalised.
    Source: Sauer et al., StyleGAN-T (arXiv 2301.09515), section 3.2.
    """

    Config = DINOConfig

    def __init__(self, config: DINOConfig) -> None:
        super().__init__()
        self.config = config = checked(config)
        self.tower: Any = create_tower(config.name, pretrained=False, **config.options).requires_grad_(False).eval()
        readable = hasattr(self.tower, "forward_intermediates") and hasattr(self.tower, "blocks")
        require(readable, "name", "a timm vision transformer", repr(config.name))
        depth = len(self.tower.blocks)
        require(max(config.blocks) < depth, "blocks", f"numbers below {depth}, the depth of the tower", config.blocks)
        self.heads = nn.ModuleList(_TokenHead(self.tower.num_features, config.kernel) for _ in config.blocks)

    def load_pretrained(self) -> None:
        """Fill the tower with timm's published weights, from its hub or the local cache."""
        published = create_tower(self.config.name, pretrained=True, **self.config.options)
        self.tower.load_state_dict(published.state_dict())

    def train(self, mode: bool = True) -> "DINODiscriminator":
        """The tower stays in evaluation mode."""
        super().train(mode)
        self.tower.eval()
        return self

    def forward(self, x: Tensor) -> Tensor:
        mean, std = (x.new_tensor(values).view(3, 1, 1) for values in (self.config.mean, self.config.std))
        size = self.tower.patch_embed.img_size
        x = x if x.shape[-2:] == size else F.interpolate(x, size, mode="bilinear", antialias=True)
        tokens = self.tower.forward_intermediates(
            ((x + 1) / 2 - mean) / std, indices=list(self.config.blocks), output_fmt="NLC", intermediates_only=True
        )
        return torch.cat([head(part) for head, part in zip(self.heads, tokens, strict=True)], dim=1)


class _TokenHead(nn.Module):
    """Tokens [B, N, C] -> logits [B, N]."""

    def __init__(self, width: int, kernel: int) -> None:
        super().__init__()
        self.pointwise = spectral_norm(nn.Conv1d(width, width, 1))
        self.near = spectral_norm(nn.Conv1d(width, width, kernel, padding=kernel // 2, padding_mode="circular"))
        self.norm1, self.norm2 = nn.GroupNorm(1, width), nn.GroupNorm(1, width)
        self.logit = spectral_norm(nn.Conv1d(width, 1, 1))

    def forward(self, tokens: Tensor) -> Tensor:
        h = F.leaky_relu(self.norm1(self.pointwise(tokens.transpose(1, 2))), 0.2)
        h = (h + F.leaky_relu(self.norm2(self.near(h)), 0.2)) / 2**0.5
        return self.logit(h)[:, 0]


DISCRIMINATORS: Mapping[str, Any] = {"patchgan": PatchGAN, "dino": DINODiscriminator}
"""Discriminators by the `kind` of their configuration."""
