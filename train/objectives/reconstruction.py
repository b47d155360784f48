"""Training of an image tokenizer: reconstruct images; optionally semantics, quantizer terms and a discriminator."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from tokenizers_mm._check import require
from tokenizers_mm.config import Range
from tokenizers_mm.data.sources import Batch, DataConfig, Mixture
from tokenizers_mm.eval.towers import save_contrast
from tokenizers_mm.eval.validation import ValidationConfig, held_out, measure
from tokenizers_mm.functional.noise import NoiseKind, inject_noise
from tokenizers_mm.losses.perceptual import load_lpips
from tokenizers_mm.models import ImageTokenizer
from tokenizers_mm.models.starting import ModelConfig, build_tokenizer, check_model, model_size, on_meta, parse_model
from tokenizers_mm.models.warm_start import WarmStartConfig, check_warm_start, warm_start
from tokenizers_mm.quantizers.revival import RevivalConfig
from tokenizers_mm.types import Disturbance

from ..config import RunConfig
from ..optim import Learner, OptimizerConfig
from .base import Moment, Networks, Player, Terms
from .images import FIXED_DATA, TokenizerObjective, image_batches, image_size
from .terms import LossConfig, check_loss, check_terms

MODEL = "config.objective.model"
"""Place of the model's configuration, as errors call it."""

FIRST = 1 << 40
"""Position of the first image of a warm start in the run's mixture, far behind all that a run trains on."""

Share = Annotated[float, Range(0, 1)]


@dataclass(frozen=True)
class NoiseConfig:
    """Disturbed pixel codes, for tokenizers with a pixel stream (see `functional.noise`).

    sample_rate: share of the samples that are disturbed. position_rate: share of the positions in them.
    """

    sample_rate: Share = 0.1
    position_rate: Share = 0.1
    kind: NoiseKind = "random"


@dataclass(frozen=True)
class ReconstructionConfig:
    """discriminator_optimizer: by default as `optimizer`. noise: disturb the pixel codes. scale_drop: chance that one
    scale but the first is left out of a step. trainable: prefixes of the parameters that learn; none means all.
    validation: held-out images for `validate_every`. warm_start: fit linear paths and codebook to training images
    before the first step (see `tokenizers_mm.models.warm_start`)."""

    model: ModelConfig
    kind: Literal["reconstruction"] = "reconstruction"
    data: DataConfig = field(default_factory=DataConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    discriminator_optimizer: OptimizerConfig | None = None
    revival: RevivalConfig = field(default_factory=RevivalConfig)
    noise: NoiseConfig | None = None
    scale_drop: Share = 0.0
    trainable: tuple[str, ...] = ()
    warm_start: WarmStartConfig | None = None
    validation: ValidationConfig = field(default_factory=ValidationConfig)


class Reconstruction(TokenizerObjective):
    """Networks: the tokenizer, its text tower for captions, its discriminator."""

    kind = "reconstruction"
    Config = ReconstructionConfig
    AVERAGED = "tokenizer"
    MEASURES = {"psnr": 1, "ssim": 1, "usage": 1, "lpips": -1}
    FIXED = (*FIXED_DATA, "model", "loss.discriminator", "loss.text_encoder", "loss.semantic", "trainable")
    config: ReconstructionConfig

    @classmethod
    def check_config(cls, run: RunConfig) -> None:
        config: ReconstructionConfig = run.objective
        check_model(config.model, MODEL)
        check_loss(config.loss, config.discriminator_optimizer is not None, run.batch_size)
        measured = run.best != "lpips" or bool(config.validation.lpips_weights)
        require(measured, "config.objective.validation.lpips_weights", "a file, for best: lpips", "nothing")
        watched = run.validate_every > 0 or config.validation == ValidationConfig()
        require(watched, "config.objective.validation", "nothing where validate_every is 0", "some values")
        if config.model.config:
            tokenizer = on_meta(config.model)
            check_terms(config.loss, tokenizer)
            _check_watched(run, tokenizer)
        if config.warm_start is not None:
            known = parse_model(config.model) if config.model.config else None
            check_warm_start(known, config.warm_start, "config.objective.warm_start")
        quantizer = config.model.config.get("quantizer")
        temperature = quantizer.get("entropy_temperature") if isinstance(quantizer, dict) else None
        idle = temperature is not None and not config.loss.weight("entropy") and not config.model.start_from
        require(not idle, "config.objective.model.config.quantizer.entropy_temperature",
                "nothing where loss.weights.entropy is 0", temperature)  # fmt: skip

    @classmethod
    def sizes(cls, run: RunConfig) -> dict[str, int | str]:
        return {"tokenizer": model_size(run.objective.model)}

    def __init__(self, run: RunConfig, accelerator: Accelerator) -> None:
        super().__init__(run, accelerator)
        self.tokenizer = build_tokenizer(self.config.model, MODEL).to(accelerator.device).train()
        _freeze(self.tokenizer, self.config.trainable)
        self.size = image_size(self.tokenizer, self.config.data)
        self._check_disturbances()
        _check_watched(run, self.tokenizer)
        side = self.tokenizer.size_multiple * max(1, 256 // self.tokenizer.size_multiple)
        size, validation = self.size or (side, side), self.config.validation
        self.adopt({"tokenizer": self.tokenizer}, size, self.config.revival)
        self._held_out, self._lpips = None, None
        if run.validate_every:
            self._held_out = held_out(validation.folder, validation.images, size)
            self._lpips = load_lpips(validation.lpips_weights) if validation.lpips_weights else None

    def _check_disturbances(self) -> None:
        config, tokenizer = self.config, self.tokenizer
        drops = "keep" in tokenizer.DISTURBANCES and self.num_scales > 1
        require(drops or not config.scale_drop, "config.objective.scale_drop", "0 (this model has one scale)",
                config.scale_drop)  # fmt: skip
        disturbed = "perturb" in tokenizer.DISTURBANCES
        require(disturbed or config.noise is None, "config.objective.noise", "nothing (this model has no pixel stream)",
                "some")  # fmt: skip
        for name, quantizer in tokenizer.quantizers().items():
            frozen = not any(p.requires_grad for p in quantizer.parameters())
            require(not (config.revival.every and quantizer.revivable and frozen), "config.objective.revival.every",
                    f"0 where the codes of {name} are not trainable", config.revival.every)  # fmt: skip

    @property
    def num_scales(self) -> int:
        """Scales of the tokenizer."""
        side = self.tokenizer.size_multiple
        streams = self.tokenizer.streams(*(self.size or (side, side)))
        return max((len(stream.grids) for stream in streams), default=1)

    def begin(self, networks: Networks, stage: int, start: int) -> list[dict[str, Any]]:
        config, seed = self.config.warm_start, self.run.seed
        if config is not None:
            assert self.size is not None  # only models of one size have a warm start
            mixture = Mixture(self.config.data, self.size, seed)
            images = torch.stack([mixture[FIRST + index]["image"] for index in range(config.images)])
            warm_start(self.tokenizer, images, config, seed)
        return []

    def enter(self, stage: int) -> None:
        for network in self.networks.values():
            network.train()

    def learners(self, stage: int) -> dict[str, Learner]:
        config = self.config
        mine = [self.networks[name] for name in ("tokenizer", *self.terms.learning)]
        found = {"tokenizer": Learner(config.optimizer, [p for m in mine for p in m.parameters() if p.requires_grad])}
        own = config.discriminator_optimizer
        begins = config.loss.gan_start if own else 0  # its own schedule begins with its first step
        return found | self.discriminator(own or config.optimizer, begins)

    def players(self, moment: Moment) -> Sequence[Player]:
        tokenizer = Player("tokenizer", ("tokenizer", *self.terms.learning), ("tokenizer",))
        return (tokenizer, *super().players(moment))

    def weights(self, player: str, moment: Moment) -> dict[str, float]:
        if player != "tokenizer":
            return super().weights(player, moment)
        return self.terms.weights(self.adversarial(moment))

    def losses(self, player: str, batch: Batch, moment: Moment) -> tuple[Terms, Terms]:
        if player != "tokenizer":
            return super().losses(player, batch, moment)
        x = batch.images.to(self.accelerator.device)
        self.keep_shown(x)
        output = self.tokenizer.reconstruct(x, self._disturbance(moment, len(x)))
        self.health.count(output.quantized)
        return self.terms(x, output, batch, self.tokenizer.last_layer, self.adversarial(moment))

    def batches(self, stage: int, start: int) -> Iterator[Batch]:
        return image_batches(self, self.config.data, self.tokenizer, start)

    def fixed_here(self) -> frozenset[str]:
        return frozenset(["batch_size"]) if self.config.data.buckets else frozenset()

    def _disturbance(self, moment: Moment, count: int) -> Disturbance:
        """Scale drop, the same for all rows of a step, and noise, drawn for each row by itself."""
        keep, noise, once = None, self.config.noise, moment.once()
        if self.config.scale_drop and float(torch.rand((), generator=once)) < self.config.scale_drop:
            dropped = 1 + int(torch.randint(self.num_scales - 1, (), generator=once))
            keep = tuple(index for index in range(self.num_scales) if index != dropped)
        if noise is None:
            return Disturbance(keep)

        def perturb(vectors: Tensor) -> Tensor:
            rows, grid = moment.rows(count), vectors.shape[1:3]
            u_sample = torch.stack([torch.rand((), generator=row) for row in rows]).to(vectors.device)
            u_position = torch.stack([torch.rand(grid, generator=row) for row in rows]).to(vectors.device)
            return inject_noise(vectors, u_sample, u_position, noise.sample_rate, noise.position_rate, noise.kind)

        return Disturbance(keep, perturb)

    def validate(self, networks: Networks) -> dict[str, float]:
        assert self._held_out is not None
        return measure(networks["tokenizer"], self._held_out, lpips=self._lpips)

    def save(self, networks: Networks, folder: Path) -> None:
        networks["tokenizer"].save(folder / "tokenizer")
        if "captions" in networks:
            save_contrast(networks["captions"], folder / "captions")


def _check_watched(run: RunConfig, tokenizer: ImageTokenizer[Any]) -> None:
    """Refuse to watch what this tokenizer does not make."""
    for key in ("sample_every", "validate_every"):
        seen = "pixel" in tokenizer.loss_terms or not getattr(run, key)
        require(seen, f"config.{key}", "0 for a tokenizer without pixels", getattr(run, key))
    require(run.best != "usage" or bool(tokenizer.quantizers()), "config.best", "psnr or ssim (there are no codes)",
            run.best)  # fmt: skip


def _freeze(tokenizer: nn.Module, trainable: tuple[str, ...]) -> None:
    """Freeze all but some parameters. A frozen tower stays frozen, whatever names it."""
    learning = {name: p for name, p in tokenizer.named_parameters() if p.requires_grad}
    unknown = [prefix for prefix in trainable if not any(name.startswith(prefix) for name in learning)]
    require(not unknown, "config.objective.trainable", "prefixes of names of parameters that can learn", unknown)
    for name, parameter in learning.items():
        parameter.requires_grad_(not trainable or name.startswith(trainable))
