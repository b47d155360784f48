"""What a run of `train.generation` reads from its file."""

from dataclasses import dataclass, field
from typing import Literal

from tokenizers_mm.config import from_mapping, read_yaml
from tokenizers_mm.data.sources import DataConfig
from tokenizers_mm.models.mar import MARConfig
from tokenizers_mm.models.mar_sampling import SamplingConfig

from .config import OptimizerConfig


@dataclass(frozen=True)
class CaptionEmbeddingConfig:
    """Words, each with its place in the caption, hashed into `buckets`; captions are cut to `max_words`."""

    buckets: int = 8192
    max_words: int = 48


@dataclass(frozen=True)
class AutoencoderStage:
    """The autoencoder's own training, before MAR's: L1 and `kl_weight` times the divergence per pixel value.

    steps: 0 leaves it as it is; else the latent scale is measured at the end, so that latents have variance 1.
    kl16: the path of kl16.ckpt to take the weights from, "" for none.
    """

    steps: int = 0
    lr: float = 1e-3
    kl_weight: float = 1e-6
    kl16: str = ""

    @property
    def optimizer(self) -> OptimizerConfig:
        """Of this stage."""
        return OptimizerConfig(self.lr, schedule="cosine", warmup=20, clip=1.0)


@dataclass(frozen=True)
class GenerationConfig:
    """A run.

    start_from: the folder of a run whose networks to go on from, "" for new ones. steps: of both stages together.
    max_seconds: of MAR's stage, 0 for no limit. batch_size: samples per process and micro-batch, `accumulate` of which
    make a step. posterior: sample latents in training (MAR) or take the mean (Harmon). drop: share of captions dropped.
    ema: decay of the saved average. precision: of autocast in MAR's stage. save_every: steps between checkpoints and
    saves of the averaged tokenizer, 0 for the end only; keep: checkpoints. resume: "auto" goes on from the newest
    checkpoint in `out`, "never" starts anew. scenes: how many held-out scene captions are drawn at the end, to be
    looked at and their colours counted.
    """

    out: str
    image_size: int
    model: MARConfig = field(default_factory=MARConfig)
    start_from: str = ""
    data: DataConfig = field(default_factory=DataConfig)
    captions: CaptionEmbeddingConfig = field(default_factory=CaptionEmbeddingConfig)
    autoencoder: AutoencoderStage = field(default_factory=AutoencoderStage)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    steps: int = 1000
    max_seconds: float = 0.0
    batch_size: int = 16
    accumulate: int = 1
    posterior: bool = True
    drop: float = 0.1
    ema: float = 0.999
    seed: int = 0
    device: str = "cpu"
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    log_every: int = 10
    save_every: int = 0
    keep: int = 2
    resume: Literal["auto", "never"] = "auto"
    scenes: int = 0


def read_generation_config(path: str, overrides: list[str]) -> GenerationConfig:
    """The configuration of a file with `key=value` overrides."""
    config = from_mapping(GenerationConfig, read_yaml(path, overrides), "config")
    for name in ("steps", "batch_size", "accumulate", "log_every", "keep"):
        if getattr(config, name) < 1:
            raise ValueError(f"config.{name}: expected at least 1, got {getattr(config, name)}")
    if config.steps <= config.autoencoder.steps:
        raise ValueError(f"config.steps: expected more than autoencoder.steps, got {config.steps}")
    if config.data.image_size is not None or config.data.buckets is not None:
        raise ValueError("config.data: expected sizes to be said by config.image_size, got image_size or buckets")
    return config
