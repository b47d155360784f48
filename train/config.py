"""One complete file per run: every key of it is a field here, and every field is read by something."""

from dataclasses import dataclass, field
from typing import Any, Literal

from tokenizers_mm.config import from_mapping, read_yaml
from tokenizers_mm.data.sources import DataConfig
from tokenizers_mm.functional.noise import NoiseKind
from tokenizers_mm.losses.captions import CaptionConfig
from tokenizers_mm.losses.discriminators import PatchGANConfig
from tokenizers_mm.models import MODELS

from .weights import TermWeights


@dataclass(frozen=True)
class ModelConfig:
    """The tokenizer: its family and the family's own configuration, or a saved tokenizer to go on from.

    With both, the configuration says what is built and the saved tokenizer gives the weights, but for the parameters
    whose names begin with one of `fresh`, which start anew (another decoder on frozen codes).
    """

    family: str = ""
    config: dict[str, Any] = field(default_factory=dict)
    start_from: str = ""
    fresh: tuple[str, ...] = ()


@dataclass(frozen=True)
class TeacherConfig:
    """A frozen timm tower whose tokens the semantic decoder learns to predict.

    name, options, mean, std, features: as in the tokenizer's own semantic encoder. pretrained: False takes random
    weights, which is of use in tests only.
    """

    name: str
    options: dict[str, Any] = field(default_factory=dict)
    mean: tuple[float, float, float] | None = None
    std: tuple[float, float, float] | None = None
    features: Literal["norm", "last", "projected"] = "norm"
    pretrained: bool = True


@dataclass(frozen=True)
class LossConfig:
    """Terms and their weights. A term with weight 0 is not computed.

    pixel: "l1" or "l2". semantic: "none", "teacher" (distillation), "target" (the same from the tokenizer's own frozen
    tower) or "captions" (contrast). gan: the generator's and discriminator's losses. gan_start: the step from which
    both act; adaptive: scale the generator's term by gradient norms. lpips_weights: a file of VGG16 weights, or "" for
    torch.hub's cache.
    """

    weights: TermWeights = field(default_factory=TermWeights)
    pixel: Literal["l1", "l2"] = "l2"
    semantic: Literal["none", "teacher", "target", "captions"] = "none"
    teacher: TeacherConfig | None = None
    captions: CaptionConfig = field(default_factory=CaptionConfig)
    gan: Literal["hinge", "non_saturating"] = "hinge"
    gan_start: int = 0
    adaptive: bool = False
    discriminator: PatchGANConfig = field(default_factory=PatchGANConfig)
    lpips_weights: str = ""


@dataclass(frozen=True)
class OptimizerConfig:
    """Adam with decoupled decay.

    schedule: of the learning rate over the run, after `warmup` steps. clip: the largest norm of all gradients together.
    """

    lr: float = 1e-4
    betas: tuple[float, float] = (0.9, 0.95)
    weight_decay: float = 0.0
    schedule: Literal["constant", "cosine"] = "constant"
    warmup: int = 0
    clip: float = 1.0


@dataclass(frozen=True)
class NoiseConfig:
    """Wrong pixel codes on purpose, for tokenizers with a pixel stream (see `functional.noise`).

    sample_rate: share of the samples that are disturbed. position_rate: share of the positions in them.
    """

    sample_rate: float = 0.1
    position_rate: float = 0.1
    kind: NoiseKind = "random"


@dataclass(frozen=True)
class UpkeepConfig:
    """Revival of codes that are not used.

    every: steps between revivals, 0 for none. until: share of the run after which codes are left in peace.
    """

    every: int = 0
    until: float = 0.8


@dataclass(frozen=True)
class TrainConfig:
    """A run.

    out: its folder. steps: optimizer steps. max_seconds: end (and finish the schedule) earlier when this much time
    has passed, 0 for never. discriminator_optimizer: the discriminator's own, where it is not to go as the tokenizer's.
    noise: disturb the pixel codes. accumulate: micro-batches per step. precision: of autocast. ema: decay of the
    average of weights that is saved, 0 for none. scale_drop: chance that one scale but the first is left out of a step.
    trainable: prefixes of the parameters that learn; none means all. log_every, sample_every, save_every: in steps, 0
    for never; keep: checkpoints. resume: "auto" goes on from the newest checkpoint in `out`, "never" starts anew.
    """

    out: str
    model: ModelConfig
    data: DataConfig = field(default_factory=DataConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    discriminator_optimizer: OptimizerConfig | None = None
    upkeep: UpkeepConfig = field(default_factory=UpkeepConfig)
    noise: NoiseConfig | None = None
    steps: int = 1000
    max_seconds: float = 0.0
    batch_size: int = 8
    accumulate: int = 1
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    ema: float = 0.0
    scale_drop: float = 0.0
    trainable: tuple[str, ...] = ()
    seed: int = 0
    log_every: int = 10
    sample_every: int = 0
    save_every: int = 1000
    keep: int = 2
    resume: Literal["auto", "never"] = "auto"


def read_config(path: str, overrides: list[str]) -> TrainConfig:
    """The configuration of a file with `key=value` overrides; the model's part is checked too."""
    config = from_mapping(TrainConfig, read_yaml(path, overrides), "config")
    if config.model.config or not config.model.start_from:
        if config.model.family not in MODELS:
            raise ValueError(f"config.model.family: expected one of {sorted(MODELS)}, got {config.model.family!r}")
        from_mapping(MODELS[config.model.family].Config, config.model.config, "config.model.config")
    check_config(config)
    return config


def check_config(config: TrainConfig) -> None:
    """Refuse values that do not go together."""
    if config.model.fresh and not (config.model.config and config.model.start_from):
        raise ValueError("config.model.fresh: expected a config and a start_from beside it, got one of them alone")
    if config.loss.semantic == "teacher" and config.loss.teacher is None:
        raise ValueError("config.loss.teacher: expected a teacher for semantic: teacher, got nothing")
    for name in ("steps", "batch_size", "accumulate", "log_every", "keep"):
        if getattr(config, name) < 1:
            raise ValueError(f"config.{name}: expected at least 1, got {getattr(config, name)}")
