"""Semantic encoder: any timm image tower by name, with its own input normalisation."""

from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

from tokenizers_mm._check import fail, require

CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


@dataclass(frozen=True)
class SemanticEncoderConfig:
    """A timm model and how its features are read.

    name: a timm model name; `options` go to `timm.create_model` (img_size, embed_dim, depth, ...).
    pretrained: start from timm's published weights (needs its hub when the tokenizer is first built for training).
    mean, std: of the image in [0, 1], which is clamped first; None passes the image in [-1, 1] on as it is.
    features: "norm" reads the tokens after the tower's last norm, "last" those of its last block.
    """

    name: str
    options: dict[str, Any] = field(default_factory=dict)
    pretrained: bool = False
    mean: tuple[float, float, float] | None = None
    std: tuple[float, float, float] | None = None
    features: Literal["norm", "last"] = "norm"


class SemanticEncoder(nn.Module):
    """x [B, 3, H, W] in [-1, 1] -> tokens [B, h, w, C] on the tower's patch grid, class and register tokens dropped."""

    def __init__(self, config: SemanticEncoderConfig) -> None:
        super().__init__()
        import timm  # heavy: loaded when a tower is built, not with the package

        require(
            (config.mean is None) == (config.std is None), "mean and std", "both or neither", (config.mean, config.std)
        )
        self.config = config
        try:
            self.tower = timm.create_model(
                config.name, pretrained=False, num_classes=0, **{"global_pool": "", **config.options}
            )
        except RuntimeError as error:
            fail("name", "a timm model", f"{config.name!r} ({error})")
        if config.features == "last" and hasattr(self.tower, "norm"):
            self.tower.norm = nn.Identity()
        self.dim = int(self.tower.num_features)  # type: ignore[arg-type]
        if config.mean is not None and config.std is not None:
            self.mean: Tensor
            self.std: Tensor
            self.register_buffer("mean", torch.tensor(config.mean).view(1, 3, 1, 1), persistent=False)
            self.register_buffer("std", torch.tensor(config.std).view(1, 3, 1, 1), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        if self.config.mean is not None:
            x = (((x + 1) / 2).clamp(0, 1) - self.mean) / self.std
        tokens = self.tower.forward_features(x)  # type: ignore[operator]
        if tokens.ndim == 4:  # a convolutional tower: [B, C, h, w]
            return tokens.permute(0, 2, 3, 1)
        tokens = tokens[:, getattr(self.tower, "num_prefix_tokens", 0) :]
        rows = self._rows(x, tokens.shape[1])
        return tokens.unflatten(1, (rows, -1))

    def _rows(self, x: Tensor, count: int) -> int:
        """Rows of the patch grid, from the shape of the image."""
        rows = round((count * x.shape[-2] / x.shape[-1]) ** 0.5)
        require(rows > 0 and count % rows == 0, "tokens", "a grid of the image's shape", f"{count} tokens")
        return rows


def load_pretrained(encoder: SemanticEncoder) -> None:
    """Fill a tower with timm's published weights, from its hub or the local cache: the first step of training."""
    import timm

    published = timm.create_model(
        encoder.config.name, pretrained=True, num_classes=0, **{"global_pool": "", **encoder.config.options}
    )
    state = published.state_dict()
    wanted = encoder.tower.state_dict()
    missing = [name for name in wanted if name not in state]
    require(not missing, f"weights of {encoder.config.name}", "all tensors of the tower", f"none for {missing[:3]}")
    encoder.tower.load_state_dict({name: state[name] for name in wanted})
