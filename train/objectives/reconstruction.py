"""Training of an image tokenizer: reconstruct images; optionally semantics, quantizer terms and a discriminator."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal, cast

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from tokenizers_mm._check import fail, require
from tokenizers_mm.config import Range
from tokenizers_mm.data.buckets import AnySize, BucketBatches
from tokenizers_mm.data.sources import SOURCES, Batch, DataConfig, Mixture, Positions, make_loader
from tokenizers_mm.eval.pictures import comparison_grid, save_picture
from tokenizers_mm.eval.towers import save_contrast
from tokenizers_mm.eval.validation import ValidationConfig, held_out, measure
from tokenizers_mm.functional.noise import NoiseKind, inject_noise
from tokenizers_mm.losses.perceptual import load_lpips
from tokenizers_mm.models import MODELS, ImageTokenizer
from tokenizers_mm.models.semantic import SemanticTokenizer
from tokenizers_mm.models.tokenflow import TokenFlow
from tokenizers_mm.quantizers.revival import CodebookHealth, RevivalConfig
from tokenizers_mm.types import Disturbance

from ..config import RunConfig
from ..optim import Learner, OptimizerConfig
from .base import Moment, Networks, Objective, Player, Terms
from .start import ModelConfig, build_tokenizer, check_model, model_size, parse_model
from .terms import ImageTerms, LossConfig, check_loss, check_terms
from .warm_start import WarmStartConfig, check_warm_start, warm_start

Share = Annotated[float, Range(0, 1)]

FIXED_DATA = ("data.sources", "data.image_size", "data.buckets")
"""Keys of the data that decide which sample is where."""


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
    before the first step (see `warm_start`)."""

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


class Reconstruction(Objective):
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
        check_model(config.model)
        check_loss(config.loss)
        measured = run.best != "lpips" or bool(config.validation.lpips_weights)
        require(measured, "config.objective.validation.lpips_weights", "a file, for best: lpips", "nothing")
        if config.model.config:
            with torch.device("meta"):
                tokenizer = MODELS[config.model.family].from_config(parse_model(config.model))
            check_terms(config.loss, tokenizer)
            seen = "pixel" in tokenizer.loss_terms or not run.validate_every
            require(seen, "config.validate_every", "0 for a tokenizer without pixels", run.validate_every)
        own = config.discriminator_optimizer
        require(own is None or bool(config.loss.weight("generator")), "config.objective.discriminator_optimizer",
                "nothing where loss.weights.generator is 0", "one")  # fmt: skip
        if config.warm_start is not None:
            check_warm_start(parse_model(config.model), "config.objective.warm_start")
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
        self.tokenizer = build_tokenizer(self.config.model).to(accelerator.device).train()
        _freeze(self.tokenizer, self.config.trainable)
        self.size = image_size(self.tokenizer, self.config.data)
        self._check_disturbances()
        self.terms = ImageTerms(self.config.loss, self.tokenizer, self.size or (256, 256))
        self.health = CodebookHealth(self.tokenizer.quantizers(), self.config.revival, "config.objective.revival")
        self.networks: dict[str, nn.Module] = {"tokenizer": self.tokenizer, **self.terms.learning}
        if self.terms.adversary is not None:
            self.networks["discriminator"] = self.terms.adversary.network
        self._shown: Tensor | None = None
        self._held_out: Tensor | None = None
        weights = self.config.validation.lpips_weights
        self._lpips = load_lpips(weights) if weights else None

    def _check_disturbances(self) -> None:
        config, tokenizer = self.config, self.tokenizer
        drops = "keep" in tokenizer.DISTURBANCES and self.num_scales > 1
        require(drops or not config.scale_drop, "config.objective.scale_drop", "0 (this model has one scale)",
                config.scale_drop)  # fmt: skip
        disturbed = "perturb" in tokenizer.DISTURBANCES
        require(disturbed or config.noise is None, "config.objective.noise", "nothing (this model has no pixel stream)",
                "some")  # fmt: skip

    @property
    def num_scales(self) -> int:
        """Scales of the tokenizer."""
        side = self.tokenizer.size_multiple
        streams = self.tokenizer.streams(*(self.size or (side, side)))
        return max((len(stream.grids) for stream in streams), default=1)

    def begin(self, networks: Networks, stage: int, start: int) -> list[dict[str, Any]]:
        if self.config.warm_start is not None:
            warm_start(
                cast("TokenFlow | SemanticTokenizer", self.tokenizer),
                self.config.data,
                self.run.seed,
                self.config.warm_start,
            )
        return []

    def enter(self, stage: int) -> None:
        for network in self.networks.values():
            network.train()

    def learners(self, stage: int) -> dict[str, Learner]:
        config = self.config
        mine = [self.networks[name] for name in ("tokenizer", *self.terms.learning)]
        found = {"tokenizer": Learner(config.optimizer, [p for m in mine for p in m.parameters() if p.requires_grad])}
        if "discriminator" in self.networks:
            own, parameters = config.discriminator_optimizer, list(self.networks["discriminator"].parameters())
            begins = config.loss.gan_start if own else 0  # its own schedule begins with its first step
            found["discriminator"] = Learner(own or config.optimizer, parameters, begins)
        return found

    def adversarial(self, moment: Moment) -> bool:
        """Whether the discriminator acts."""
        return self.terms.adversary is not None and moment.step >= self.config.loss.gan_start

    def players(self, moment: Moment) -> Sequence[Player]:
        first = Player("tokenizer", ("tokenizer", *self.terms.learning), ("tokenizer",))
        second = Player("discriminator", ("discriminator",), ("discriminator",))
        return (first, second) if self.adversarial(moment) else (first,)

    def weights(self, player: str, moment: Moment) -> dict[str, float]:
        if player == "discriminator":
            assert self.terms.adversary is not None
            return self.terms.adversary.weights()
        return self.terms.weights(self.adversarial(moment))

    def batches(self, stage: int, start: int) -> Iterator[Batch]:
        return image_batches(self, self.config.data, self.tokenizer, start)

    def fixed_here(self) -> frozenset[str]:
        return frozenset(["batch_size"]) if self.config.data.buckets else frozenset()

    def losses(self, player: str, batch: Batch, moment: Moment) -> tuple[Terms, Terms]:
        if player == "discriminator":
            assert self.terms.adversary is not None
            return self.terms.adversary.terms(), {}
        x = batch.images.to(self.accelerator.device)
        self._shown = x[:8] if self._shown is None else self._shown
        output = self.tokenizer.reconstruct(x, self._disturbance(moment, len(x)))
        self.health.count(output.quantized)
        return self.terms(x, output, batch, self.tokenizer.last_layer, self.adversarial(moment))

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

    def after_step(self, moment: Moment, step: int) -> tuple[dict[str, float], list[dict[str, Any]]]:
        self.terms.after_step()
        return self.health.after_step(moment.step + 1, moment.progress, moment.once(3)), []

    def validate(self, networks: Networks) -> dict[str, float]:
        config, averaged = self.config.validation, networks["tokenizer"]
        if self._held_out is None:
            side = averaged.size_multiple * max(1, 256 // averaged.size_multiple)
            self._held_out = held_out(config.folder, config.images, self.size or (side, side))
        return measure(averaged, self._held_out, lpips=self._lpips)

    def window(self) -> dict[str, float]:
        return self.health.window()

    def skipped(self, batch: Batch) -> Sequence[str]:
        return batch.skipped

    def show(self, networks: Networks, path: Path) -> None:
        if self._shown is not None and "pixel" in self.tokenizer.loss_terms:
            show_reconstructions(networks["tokenizer"], self._shown, path)

    def save(self, networks: Networks, folder: Path) -> None:
        networks["tokenizer"].save(folder / "tokenizer")
        if "captions" in networks:
            save_contrast(networks["captions"], folder / "captions")

    def state_dict(self) -> dict[str, Any]:
        return {"health": self.health.state_dict(), "terms": self.terms.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.health.load_state_dict(state["health"])
        self.terms.load_state_dict(state["terms"])


def image_size(tokenizer: ImageTokenizer[Any], data: DataConfig) -> tuple[int, int] | None:
    """(height, width) of all images, None with buckets of sizes; what contradicts itself is refused."""
    own, given, where = tokenizer.image_size, data.image_size, "config.objective.data"
    require(own is None or given in (None, own), f"{where}.image_size", f"{own}, the size of the tokenizer", given)
    size = own or given
    if size is None and data.buckets is None:
        fail(where, "image_size or buckets for a tokenizer of any size", "neither")
    if size is not None:
        tokenizer.check_size(*size)
    if data.buckets is not None:
        require(size is None, f"{where}.buckets", "a tokenizer of any size and no image_size", size)
    return size


def image_batches(
    objective: Objective, data: DataConfig, tokenizer: ImageTokenizer[Any], start: int
) -> Iterator[Batch]:
    """Micro-batches of images of this process from sample `start` of the run on."""
    run, (rank, world) = objective.run, objective.rank()
    size = image_size(tokenizer, data)
    if data.buckets is None:
        assert size is not None
        dataset, positions = Mixture(data, size, run.seed), Positions(run.batch_size, start, rank, world)
    else:
        sources = [SOURCES[source.kind](source) for source in data.sources]
        dataset = AnySize(sources, data.buckets, data.workers, [source.weight for source in data.sources])
        first = start // (run.batch_size * world)
        positions = BucketBatches(dataset.sizes, run.batch_size, run.seed, first, rank, world)
    return iter(make_loader(dataset, positions))


@torch.no_grad()
def show_reconstructions(tokenizer: Any, images: Tensor, path: Path) -> None:
    """Originals over reconstructions, as a PNG file."""
    was_training = tokenizer.training
    tokenizer.eval()
    decoded = tokenizer.decode(tokenizer.encode(images)).float().clamp(-1, 1).cpu()
    tokenizer.train(was_training)
    save_picture(comparison_grid(images.cpu(), decoded), path)


def _freeze(tokenizer: nn.Module, trainable: tuple[str, ...]) -> None:
    names = [name for name, _ in tokenizer.named_parameters()]
    unknown = [prefix for prefix in trainable if not any(name.startswith(prefix) for name in names)]
    require(not unknown, "config.objective.trainable", "prefixes of parameter names", unknown)
    for name, parameter in tokenizer.named_parameters():
        if trainable:
            parameter.requires_grad_(name.startswith(trainable))
