"""Discriminators for adversarial training."""

from dataclasses import dataclass
from typing import Annotated, Literal

from torch import Tensor, nn

from tokenizers_mm.config import Range


@dataclass(frozen=True)
class PatchGANConfig:
    """channels of the first layer, `num_layers` stride-2 layers. norm "batch" is the published one; "none" is exact
    under gradient accumulation."""

    channels: Annotated[int, Range(1, 1 << 12)] = 64
    num_layers: Annotated[int, Range(1, 16)] = 3
    norm: Literal["batch", "none"] = "batch"


class PatchGAN(nn.Module):
    """x [B, 3, H, W] -> logits [B, 1, h, w], one per patch (Isola et al., arXiv 1611.07004, section 3.2)."""

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
