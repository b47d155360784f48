"""Semantic encoder: any timm image tower by name, with its own input normalisation."""

from dataclasses import dataclass, field
from typing import Any, Literal

from torch import Tensor, nn

from tokenizers_mm._check import fail, require

CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


@dataclass(frozen=True)
class SemanticEncoderConfig:
    """A timm model and how its features are read.

    name: a timm model name; `options` go to `timm.create_model` (img_size, embed_dim, depth, ...; embed_cfg, the sizes
    of ViTamin's convolutional stem, as a mapping).
    pretrained: start from timm's published weights (needs its hub when the tokenizer is first built for training).
    mean, std: of the image in [0, 1], which is clamped first; None passes the image in [-1, 1] on as it is.
    features: "norm" reads the tokens after the tower's last norm, "last" those of its last block, "projected" the
    normed ones through the tower's head (CLIP's joint space), whose width is the option num_classes.
    """

    name: str
    options: dict[str, Any] = field(default_factory=dict)
    pretrained: bool = False
    mean: tuple[float, float, float] | None = None
    std: tuple[float, float, float] | None = None
    features: Literal["norm", "last", "projected"] = "norm"


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
            options = {"global_pool": "", "num_classes": 0, **_timm_options(config.options)}
            self.tower = timm.create_model(config.name, pretrained=False, **options)
        except RuntimeError as error:
            fail("name", "a timm model", f"{config.name!r} ({error})")
        if config.features == "last" and hasattr(self.tower, "norm"):
            self.tower.norm = nn.Identity()
        projected = config.features == "projected"
        require(not projected or options["num_classes"] > 0, "options.num_classes", "the width of the head", 0)
        self.dim = int(options["num_classes"] if projected else self.tower.num_features)  # type: ignore[arg-type]

    def forward(self, x: Tensor) -> Tensor:
        mean, std = self.config.mean, self.config.std
        if mean is not None and std is not None:
            x = (((x + 1) / 2).clamp(0, 1) - x.new_tensor(mean).view(3, 1, 1)) / x.new_tensor(std).view(3, 1, 1)
        tokens = self.tower.forward_features(x)  # type: ignore[operator]
        if tokens.ndim == 4:  # a convolutional tower: [B, C, h, w]
            return tokens.permute(0, 2, 3, 1)
        tokens = tokens[:, getattr(self.tower, "num_prefix_tokens", 0) :]
        if self.config.features == "projected":
            tokens = self.tower.head(tokens)  # type: ignore[operator]
        rows = self._rows(x, tokens.shape[1])
        return tokens.unflatten(1, (rows, -1))

    def _rows(self, x: Tensor, count: int) -> int:
        """Rows of the patch grid, from the shape of the image."""
        rows = round((count * x.shape[-2] / x.shape[-1]) ** 0.5)
        require(rows > 0 and count % rows == 0, "tokens", "a grid of the image's shape", f"{count} tokens")
        return rows


def _timm_options(options: dict[str, Any]) -> dict[str, Any]:
    """Plain values as timm wants them: it takes the sizes of a hybrid stem as an object of its own."""
    stem = options.get("embed_cfg")
    if stem is None:
        return options
    from timm.models.vitamin import VitCfg

    try:
        return {**options, "embed_cfg": VitCfg(**stem)}
    except TypeError as error:
        fail("options.embed_cfg", "embed_dim, depths and stem_width", str(error))


def load_pretrained(encoder: SemanticEncoder) -> None:
    """Fill a tower with timm's published weights, from its hub or the local cache: the first step of training."""
    import timm

    ours = _timm_options(encoder.config.options)  # the published tower keeps its own depth and pooling
    options = {name: value for name, value in ours.items() if name not in ("depth", "global_pool")}
    published = timm.create_model(encoder.config.name, pretrained=True, **{"num_classes": 0, **options})
    state = published.state_dict()
    wanted = encoder.tower.state_dict()
    missing = [name for name in wanted if name not in state]
    require(not missing, f"weights of {encoder.config.name}", "all tensors of the tower", f"none for {missing[:3]}")
    encoder.tower.load_state_dict({name: state[name] for name in wanted})
