"""The configuration of joint tuning: one complete file, one key `joint` with its stages and its guard."""

from dataclasses import dataclass, field
from typing import Literal

from tokenizers_mm._check import fail, require
from tokenizers_mm.config import from_mapping, read_yaml
from tokenizers_mm.data.sources import DataConfig, list_images

from .bridge_config import LanguageModelConfig, RecordConfig
from .config import LossConfig, ModelConfig, OptimizerConfig, TrainConfig, check_config

PARTS = ("tokenizer", "projector", "language_model")


@dataclass(frozen=True)
class StageConfig:
    """A stage; a part learns if it has an optimizer here, and is frozen if it has none.

    stage: "align" (the projector alone), "joint" (the tokenizer, and the projector or the model or both) or "chat" (the
    tokenizer frozen).
    tokenizer, projector, language_model: each part's own rate, warm-up, schedule (over the stage) and clipping.
    records: rows of these files (see `tokenizers_mm.llm.records`) in place of captions, where the tokenizer is frozen.
    """

    stage: Literal["align", "joint", "chat"]
    steps: int
    tokenizer: OptimizerConfig | None = None
    projector: OptimizerConfig | None = None
    language_model: OptimizerConfig | None = None
    records: tuple[RecordConfig, ...] = ()

    def learns(self, part: str) -> OptimizerConfig | None:
        """The optimizer of a part, None where it is frozen."""
        return {"tokenizer": self.tokenizer, "projector": self.projector, "language_model": self.language_model}[part]


@dataclass(frozen=True)
class GuardConfig:
    """What watches the reconstruction of fixed held-out pictures while the tokenizer learns with the language model.

    every: steps between looks; the end of a joint stage is always looked at. folder: of pictures, by default rendered
    scenes that no training sees. pictures: how many. max_psnr_drop: dB below the mean PSNR before the first joint
    stage. max_fid_ratio: of rFID to the rFID before, measured where `inception` names torch-fidelity's weights file.
    action: beyond a bound "stop" ends the run with all three parts as they last were within the bounds, "freeze" takes
    the tokenizer back to there and goes on with the others.
    """

    every: int = 500
    folder: str = ""
    pictures: int = 64
    max_psnr_drop: float = 1.0
    max_fid_ratio: float = 1.6
    inception: str = ""
    action: Literal["stop", "freeze"] = "stop"


@dataclass(frozen=True)
class TuningConfig:
    """alpha: weight of the tokenizer's objective beside the caption loss. prompt: text between image and caption.

    activation: of a new projector; projector_from: a folder that holds one already.
    """

    stages: tuple[StageConfig, ...]
    alpha: float = 0.25
    guard: GuardConfig = field(default_factory=GuardConfig)
    prompt: str = ""
    activation: Literal["gelu", "silu"] = "gelu"
    projector_from: str = ""


@dataclass(frozen=True)
class JointConfig:
    """A run.

    out: its folder. tokenizer: directory or hub id of the image tokenizer to begin with. data: images with captions.
    loss: the tokenizer's own objective; its `gan_start` counts the steps of a joint stage. discriminator_optimizer: by
    default the tokenizer's. All other keys are as in a tokenizer's run; fp16 is not offered.
    """

    out: str
    tokenizer: str
    language_model: LanguageModelConfig
    joint: TuningConfig
    data: DataConfig
    loss: LossConfig = field(default_factory=LossConfig)
    discriminator_optimizer: OptimizerConfig | None = None
    batch_size: int = 8
    accumulate: int = 1
    precision: Literal["fp32", "bf16"] = "fp32"
    seed: int = 0
    log_every: int = 10
    save_every: int = 1000
    keep: int = 2
    resume: Literal["auto", "never"] = "auto"

    @property
    def steps(self) -> int:
        """Of all stages."""
        return sum(stage.steps for stage in self.joint.stages)

    def place(self, step: int) -> tuple[int, int]:
        """The stage that a step of the run belongs to, and the step within it."""
        for index, stage in enumerate(self.joint.stages):
            if step < stage.steps:
                return index, step
            step -= stage.steps
        return len(self.joint.stages), step

    def for_tokenizer(self) -> TrainConfig:
        """What the tokenizer's program needs to know of this run."""
        return TrainConfig(
            self.out,
            ModelConfig(start_from=self.tokenizer),
            self.data,
            self.loss,
            discriminator_optimizer=self.discriminator_optimizer,
            steps=self.steps,
            batch_size=self.batch_size,
            accumulate=self.accumulate,
            precision=self.precision,
            seed=self.seed,
            log_every=self.log_every,
            save_every=self.save_every,
            keep=self.keep,
            resume=self.resume,
        )


def read_joint_config(path: str, overrides: list[str]) -> JointConfig:
    """The configuration of a file with `key=value` overrides, checked."""
    config = from_mapping(JointConfig, read_yaml(path, overrides), "config")
    require(len(config.joint.stages) > 0, "config.joint.stages", "at least one stage", "none")
    for index, stage in enumerate(config.joint.stages):
        _check_stage(stage, f"config.joint.stages[{index}]")
    guard = config.joint.guard
    for name, value in (("every", guard.every), ("pictures", guard.pictures)):
        require(value >= 1, f"config.joint.guard.{name}", "at least 1", value)
    require(guard.max_psnr_drop > 0, "config.joint.guard.max_psnr_drop", "a number of dB above 0", guard.max_psnr_drop)
    require(guard.max_fid_ratio > 1, "config.joint.guard.max_fid_ratio", "a number above 1", guard.max_fid_ratio)
    require(config.joint.alpha >= 0, "config.joint.alpha", "a number from 0 on", config.joint.alpha)
    check_config(config.for_tokenizer())
    _check_data(config)
    return config


def _check_stage(stage: StageConfig, where: str) -> None:
    require(stage.steps >= 1, f"{where}.steps", "at least 1", stage.steps)
    learning = [part for part in PARTS if stage.learns(part) is not None]
    if not learning:
        fail(where, f"an optimizer for one of {list(PARTS)}", "none")
    if stage.stage == "align":
        require(learning == ["projector"], where, "an optimizer for the projector alone (stage: align)", learning)
    if stage.stage == "joint":
        both = "tokenizer" in learning and len(learning) > 1
        require(both, where, "optimizers for the tokenizer and another part (stage: joint)", learning)
    if stage.stage == "chat":
        require("tokenizer" not in learning, where, "no optimizer for the tokenizer (stage: chat)", learning)
    require(not stage.records or stage.stage != "joint", f"{where}.records", "none in a joint stage", "some")


def _check_data(config: JointConfig) -> None:
    require(config.data.buckets is None, "config.data.buckets", "nothing (one image size)", "buckets")
    captioned = any(
        source.kind == "scenes"
        or (source.kind == "folder" and any(p.with_suffix(".txt").is_file() for p in list_images(source.path)))
        for source in config.data.sources
    )
    require(captioned, "config.data.sources", "images with captions (scenes, or a folder with texts)", "none")
