"""Joint tuning of an image tokenizer and the language model that reads it, in stages (ETT, arXiv 2505.10562).

The loss of a joint stage is that of captions plus alpha times the tokenizer's own (`terms.ImageTerms`).
`tokenizers_mm/llm/joint.py` holds the formulas and says which parameters the caption's gradient reaches.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from accelerate import Accelerator
from torch import nn

from tokenizers_mm import load
from tokenizers_mm._check import fail, require
from tokenizers_mm.config import Range
from tokenizers_mm.data.sources import Batch, DataConfig
from tokenizers_mm.eval.validation import held_out
from tokenizers_mm.llm import Batch as Rows
from tokenizers_mm.llm import FeatureProjector, ProjectorConfig
from tokenizers_mm.llm.building import (
    LanguageModelConfig,
    build_language_model,
    language_model_size,
    save_language_model,
)
from tokenizers_mm.llm.joint import caption_batch, caption_loss, num_labels, read_codes
from tokenizers_mm.llm.loss import num_predicted
from tokenizers_mm.llm.transformers_api import embeddings
from tokenizers_mm.models.starting import saved_size
from tokenizers_mm.quantizers.revival import RevivalConfig

from ..config import RunConfig
from ..optim import Learner, OptimizerConfig
from ..step import weighted_sum
from .base import Moment, Networks, Player, Stage, Terms
from .guard import Guard, GuardConfig
from .images import FIXED_DATA, TokenizerObjective, image_batches, image_size
from .language import LANGUAGE_MODEL, RecordConfig, record_batches
from .terms import LossConfig, check_loss

PARTS = ("tokenizer", "projector", "language_model")


@dataclass(frozen=True)
class StageConfig:
    """A stage; a part learns if it has an optimizer here, and is frozen if it has none.

    stage: "align" (the projector alone), "joint" (the tokenizer, and the projector or the model or both) or "chat" (the
    tokenizer frozen). tokenizer, projector, language_model: rate, warm-up, schedule (over the stage) and clipping of
    each part. records: rows of these files (see `tokenizers_mm.llm.records`) in place of captions, where the tokenizer
    is frozen.
    """

    stage: Literal["align", "joint", "chat"]
    steps: Annotated[int, Range(1)]
    tokenizer: OptimizerConfig | None = None
    projector: OptimizerConfig | None = None
    language_model: OptimizerConfig | None = None
    records: tuple[RecordConfig, ...] = ()

    def learning(self) -> dict[str, OptimizerConfig]:
        """Optimizers of the parts that learn, by part."""
        own = {"tokenizer": self.tokenizer, "projector": self.projector, "language_model": self.language_model}
        return {part: options for part, options in own.items() if options is not None}


@dataclass(frozen=True)
class JointConfig:
    """tokenizer: directory or hub id of the image tokenizer to begin with. data: images with captions. loss: the
    tokenizer's own objective; its `gan_start` counts the steps of a joint stage. discriminator_optimizer: by default
    the tokenizer's. alpha: weight of the tokenizer's objective beside the caption loss. prompt: text between image and
    caption. activation: of a new projector; projector_from: folder that holds one already."""

    tokenizer: str
    language_model: LanguageModelConfig
    stages: tuple[StageConfig, ...]
    data: DataConfig
    kind: Literal["joint"] = "joint"
    alpha: Annotated[float, Range(0)] = 0.25
    guard: GuardConfig = field(default_factory=GuardConfig)
    prompt: str = ""
    activation: Literal["gelu", "silu"] = "gelu"
    projector_from: str = ""
    loss: LossConfig = field(default_factory=LossConfig)
    discriminator_optimizer: OptimizerConfig | None = None


class Joint(TokenizerObjective):
    """Networks: the three parts, the tokenizer's text tower for captions, its discriminator.

    learnable: parameters of each part that may learn at all (a tokenizer's frozen tower never does).
    """

    kind = "joint"
    Config = JointConfig
    FIXED = (*FIXED_DATA, "tokenizer", "language_model", "activation", "projector_from", "loss.discriminator",
             "loss.text_encoder", "loss.semantic")  # fmt: skip
    config: JointConfig

    @classmethod
    def stages_of(cls, run: RunConfig) -> tuple[Stage, ...]:
        return tuple(Stage(stage.stage, stage.steps) for stage in run.objective.stages)

    @classmethod
    def check_config(cls, run: RunConfig) -> None:
        config: JointConfig = run.objective
        require(run.steps == 0, "config.steps", "0 or nothing (the stages of a joint run say it)", run.steps)
        require(run.engine == "ddp", "config.engine", "ddp for joint tuning (its guard takes back whole networks)",
                run.engine)  # fmt: skip
        require(run.precision != "fp16", "config.precision", "fp32 or bf16 for joint tuning", run.precision)
        require(len(config.stages) > 0, "config.objective.stages", "at least one stage", "none")
        for index, stage in enumerate(config.stages):
            _check_stage(stage, f"config.objective.stages[{index}]")
        check_loss(config.loss, config.discriminator_optimizer is not None, run.batch_size)
        bounded = bool(config.guard.inception) or config.guard.max_fid_ratio == GuardConfig.max_fid_ratio
        require(bounded, "config.objective.guard.max_fid_ratio", "nothing where inception names no file",
                config.guard.max_fid_ratio)  # fmt: skip
        require(config.data.buckets is None, "config.objective.data.buckets", "nothing (one image size)", "buckets")

    @classmethod
    def sizes(cls, run: RunConfig) -> dict[str, int | str]:
        config = run.objective
        return {
            "tokenizer": saved_size(config.tokenizer),
            "language model": language_model_size(config.language_model, LANGUAGE_MODEL),
        }

    def __init__(self, run: RunConfig, accelerator: Accelerator) -> None:
        super().__init__(run, accelerator)
        config, device = self.config, accelerator.device
        config.data.require_captions("config.objective.data")
        self.tokenizer = tokenizer = load(config.tokenizer).to(device).train()
        size = image_size(tokenizer, config.data)
        assert size is not None
        self.size = size
        require(len(tokenizer.streams(*size)) > 0, "config.objective.tokenizer", "one with codes", "a continuous one")
        model, self.processor = build_language_model(config.language_model, tokenizer, LANGUAGE_MODEL)
        self.model, self.projector = model.to(device), self._projector(model).to(device)
        parts = {"tokenizer": tokenizer, "projector": self.projector, "language_model": self.model}
        self.adopt(parts, size, RevivalConfig())
        self.guard = Guard(config.guard, held_out(config.guard.folder, config.guard.pictures, size))
        self.learnable = {part: [p for p in self.networks[part].parameters() if p.requires_grad] for part in PARTS}
        self.learnable["tokenizer"] += [p for module in self.terms.learning.values() for p in module.parameters()]

    def _projector(self, model: Any) -> FeatureProjector:
        dims = (read_codes(self.tokenizer, torch.zeros(1, 3, *self.size, device=self.tokenizer.device)).shape[-1],)
        width, source = embeddings(model).weight.shape[1], self.config.projector_from
        if not source:
            return FeatureProjector(ProjectorConfig(dims, width, self.config.activation))
        projector = FeatureProjector.load(source)
        fitting = projector.config == ProjectorConfig(dims, width, self.config.activation)
        require(fitting, "config.objective.projector_from",
                f"one from {dims} to {width} channels with {self.config.activation}", projector.config)  # fmt: skip
        return projector

    def learning(self, stage: int) -> dict[str, OptimizerConfig]:
        """Optimizers of the parts that learn in a stage; a tokenizer that the guard froze does not."""
        found = self.config.stages[stage].learning()
        return {part: options for part, options in found.items() if part != "tokenizer" or not self.guard.frozen}

    def enter(self, stage: int) -> None:
        """Frozen parts are in evaluation mode and collect no gradients."""
        learning = self.learning(stage)
        for part in PARTS:
            self.networks[part].train(part in learning)
            for parameter in self.learnable[part]:
                parameter.requires_grad_(part in learning)

    def learners(self, stage: int) -> dict[str, Learner]:
        learning = self.config.stages[stage].learning()  # a tokenizer that the guard freezes keeps an idle optimizer
        found = {part: Learner(options, self.learnable[part]) for part, options in learning.items()}
        if "tokenizer" in learning:
            options = self.config.discriminator_optimizer or learning["tokenizer"]
            found |= self.discriminator(options, self.config.loss.gan_start)
        return found

    def tunes(self, stage: int) -> bool:
        return "tokenizer" in self.learning(stage)

    def players(self, moment: Moment) -> Sequence[Player]:
        parts = Player("parts", (*PARTS, *self.terms.learning), tuple(self.learning(moment.stage)))
        return (parts, *super().players(moment))

    def weights(self, player: str, moment: Moment) -> dict[str, float]:
        if player != "parts":
            return super().weights(player, moment)
        if not self.tunes(moment.stage):
            return {"caption": 1.0}
        own = self.terms.weights(self.adversarial(moment))
        return {"caption": 1.0, **{name: self.config.alpha * weight for name, weight in own.items()}}

    def counts(self, player: str, batch: Batch | Rows) -> dict[str, int]:
        if player != "parts":
            return {}
        rows = isinstance(batch, Rows)
        count = num_predicted(batch.labels) if rows else num_labels(self.processor, batch.captions)
        return {"caption": count, "labels": count}

    def batches(self, stage: int, start: int) -> Iterator[Batch | Rows]:
        records = self.config.stages[stage].records
        if records:
            return record_batches(self, records, self.processor, start)
        return image_batches(self, self.config.data, self.tokenizer, start)

    def losses(self, player: str, batch: Batch | Rows, moment: Moment) -> tuple[Terms, Terms]:
        """The caption loss of a micro-batch, 0 without captions, and where the tokenizer learns its own terms."""
        if player != "parts":
            return super().losses(player, batch, moment)
        device = self.accelerator.device
        if isinstance(batch, Rows):
            return {"caption": caption_loss(self.model, self.projector, batch.to(device))}, {}
        x = batch.images.to(device)
        self.keep_shown(x)
        output = self.tokenizer.reconstruct(x) if self.tunes(moment.stage) else None
        rows = caption_batch(
            self.processor, read_codes(self.tokenizer, x, output), self.size, batch.captions, self.config.prompt
        )
        zero = torch.zeros((), device=device)
        caption = zero if rows is None else caption_loss(self.model, self.projector, rows.to(device))
        if output is None:
            return {"caption": caption}, {}
        adversarial = self.adversarial(moment)
        terms, values = self.terms(x, output, batch, self.tokenizer.last_layer, adversarial)
        self.health.count(output.quantized)
        values["vq"] = weighted_sum(terms, self.terms.weights(adversarial)).detach()
        return {"caption": caption, **terms}, values

    def begin(self, networks: Networks, stage: int, start: int) -> list[dict[str, Any]]:
        """The guard's first measurement, before the first joint stage."""
        first = self.stages[stage].name == "joint" and not self.guard.before
        return [self.guard.measure(self._guarded(), sum(s.steps for s in self.stages[:stage]))] if first else []

    def after_step(self, moment: Moment, step: int) -> tuple[dict[str, float], list[dict[str, Any]]]:
        values, notes = super().after_step(moment, step)
        within, guard = moment.step + 1, self.guard
        due = within % self.config.guard.every == 0 or within == self.stages[moment.stage].steps
        if not due or not self.tunes(moment.stage):
            return values, notes
        line = guard.measure(self._guarded(), step)
        if guard.crossed:
            line["message"] = guard.message(step)
            self.enter(moment.stage)
        return values, [line]

    def _guarded(self) -> dict[str, nn.Module]:
        return {part: self.networks[part] for part in PARTS}

    @property
    def stopped(self) -> bool:
        return self.guard.stopped

    def save(self, networks: Networks, folder: Path) -> None:
        """The language model as `language` saves it, and the image tokenizer in `tokenizer` below it."""
        save_language_model(self.model, self.processor, self.projector, folder)
        self.tokenizer.eval().save(folder / "tokenizer")

    def changing(self) -> dict[str, Any]:
        return super().changing() | {"guard": self.guard}


def _check_stage(stage: StageConfig, where: str) -> None:
    learning = list(stage.learning())
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
