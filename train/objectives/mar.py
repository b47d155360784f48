"""Training of MAR: first the autoencoder, if asked, then masked generation on its frozen latents.

Captions are dropped now and then for guidance. Randomness is drawn row by row, so several processes, or several
micro-batches, draw what one large batch would. (Dropout inside the networks depends on how a batch is divided.)
"""

import dataclasses
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from tokenizers_mm import load
from tokenizers_mm._check import fail, require
from tokenizers_mm._files import write_json
from tokenizers_mm._ranks import rank_and_world, sum_over_ranks
from tokenizers_mm.checkpoints.mar import read_kl16
from tokenizers_mm.config import Range
from tokenizers_mm.data.sources import Batch, DataConfig
from tokenizers_mm.encoders.captions import CaptionEmbedding, CaptionEmbeddingConfig
from tokenizers_mm.models.loading import read_safetensors
from tokenizers_mm.models.mar import MAR, MARConfig, decay_groups
from tokenizers_mm.models.mar_sampling import SamplingConfig
from tokenizers_mm.models.saving import save_tensors
from tokenizers_mm.models.starting import saved_size

from ..config import RunConfig
from ..optim import Learner, OptimizerConfig
from .base import Moment, Networks, Objective, Player, Stage, Terms
from .images import FIXED_DATA, image_batches, show_reconstructions


@dataclass(frozen=True)
class AutoencoderStage:
    """The autoencoder's own training, before MAR's: L1 and `kl_weight` times the divergence per pixel value.

    steps: 0 leaves it as it is; else the latent scale is measured at the end, so that latents have variance 1.
    kl16: path of kl16.ckpt, whose weights it starts from, "" for none.
    """

    steps: Annotated[int, Range(0)] = 0
    lr: Annotated[float, Range(0)] = 1e-3
    kl_weight: Annotated[float, Range(0)] = 1e-6
    kl16: str = ""

    @property
    def optimizer(self) -> OptimizerConfig:
        """Settings of this stage's optimizer."""
        return OptimizerConfig(self.lr, schedule="cosine", warmup=20, clip=1.0)


@dataclass(frozen=True)
class MARTrainingConfig:
    """start_from: folder of a run whose networks to continue from, "" for new ones; `model` is then that run's.
    posterior: sample latents in training (MAR) or take the mean (Harmon). drop: share of captions dropped.
    scenes: number of held-out scene captions that are drawn at the end, and their colours counted. The last stage has
    the steps of the run that `autoencoder.steps` leaves; `precision` holds for it alone."""

    data: DataConfig
    kind: Literal["mar"] = "mar"
    model: MARConfig = field(default_factory=MARConfig)
    start_from: str = ""
    captions: CaptionEmbeddingConfig = field(default_factory=CaptionEmbeddingConfig)
    autoencoder: AutoencoderStage = field(default_factory=AutoencoderStage)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    posterior: bool = True
    drop: Annotated[float, Range(0, 1)] = 0.1
    scenes: Annotated[int, Range(0)] = 0


class Generator(nn.Module):
    """A MAR tokenizer and the embedding of captions."""

    def __init__(self, tokenizer: MAR, captions: CaptionEmbedding) -> None:
        super().__init__()
        self.tokenizer, self.captions = tokenizer, captions

    def condition(self, captions: Sequence[str]) -> Tensor:
        """Vectors [B, C]; an empty caption is none."""
        present = torch.tensor([bool(caption) for caption in captions], device=self.tokenizer.device)
        return torch.where(present[:, None], self.captions(captions), self.tokenizer.encoder.no_class)


class MARTraining(Objective):
    """Stages: "autoencoder", if it has steps, and "mar". One network, "generator"."""

    kind = "mar"
    Config = MARTrainingConfig
    AVERAGED = "generator"
    SHOWS = True
    FIXED = (*FIXED_DATA, "model", "start_from", "captions", "autoencoder.steps", "autoencoder.kl16")
    config: MARTrainingConfig

    @classmethod
    def stages_of(cls, run: RunConfig) -> tuple[Stage, ...]:
        first = run.objective.autoencoder.steps
        return (*([Stage("autoencoder", first)] if first else []), Stage("mar", run.steps - first))

    @classmethod
    def check_config(cls, run: RunConfig) -> None:
        data = run.objective.data
        square = data.image_size is not None and data.image_size[0] == data.image_size[1] and data.buckets is None
        require(square, "config.objective.data.image_size", "a square and no buckets", data.image_size)

    @classmethod
    def sizes(cls, run: RunConfig) -> dict[str, int | str]:
        if run.objective.start_from:
            return {"tokenizer": saved_size(str(Path(run.objective.start_from) / "tokenizer"))}
        with torch.device("meta"):
            model = MAR.from_config(run.objective.model)
        sizes: dict[str, int | str] = {}
        for name, part in model.named_children():
            sizes[name] = sum(p.numel() for p in part.parameters())
        return sizes

    def __init__(self, run: RunConfig, accelerator: Accelerator) -> None:
        super().__init__(run, accelerator)
        tokenizer = _tokenizer(self.config)
        self.model = Generator(tokenizer, _captions(self.config, tokenizer.feature_dim)).to(accelerator.device)
        self.networks: dict[str, nn.Module] = {"generator": self.model}

    def learns_latents(self, stage: int) -> bool:
        """True if a stage is MAR's own, with the autoencoder frozen."""
        return self.stages[stage].name == "mar"

    def enter(self, stage: int) -> None:
        mar, autoencoder = self.learns_latents(stage), self.model.tokenizer.autoencoder
        self.model.train().requires_grad_(mar)
        autoencoder.train(not mar).requires_grad_(not mar)

    def learners(self, stage: int) -> dict[str, Learner]:
        options = self.config.optimizer
        if self.learns_latents(stage):
            return {"mar": Learner(options, decay_groups(self.model, options.weight_decay, "tokenizer."))}
        parameters = list(self.model.tokenizer.autoencoder.parameters())
        return {"autoencoder": Learner(self.config.autoencoder.optimizer, parameters)}

    def players(self, moment: Moment) -> Sequence[Player]:
        name = self.stages[moment.stage].name
        return (Player(name, ("generator",), (name,)),)

    def weights(self, player: str, moment: Moment) -> dict[str, float]:
        if player == "mar":
            return {"noise": 1.0, "bound": 1.0}
        return {"pixel": 1.0, "divergence": self.config.autoencoder.kl_weight}

    def batches(self, stage: int, start: int) -> Iterator[Batch]:
        return image_batches(self, self.config.data, self.model.tokenizer, start)

    def losses(self, player: str, batch: Batch, moment: Moment) -> tuple[Terms, Terms]:
        x, rows = batch.images.to(self.accelerator.device), moment.rows(len(batch.images))
        self.keep_shown(x)
        if player == "mar":
            return self._mar_terms(x, batch.captions, rows, moment), {}
        with torch.autocast(x.device.type, enabled=False):
            autoencoder = self.model.tokenizer.autoencoder
            posterior = autoencoder.posterior(x)
            pixel = (autoencoder.decode(posterior.sample(_latent_noise(rows, posterior.mean))) - x).abs().mean()
            return {"pixel": pixel, "divergence": posterior.kl().mean() / x[0].numel()}, {}

    def _mar_terms(self, x: Tensor, captions: Sequence[str], rows: Sequence[torch.Generator], moment: Moment) -> Terms:
        """MAR's two terms on frozen latents, some captions dropped; all rows of a step hide equally many tokens."""
        config, tokenizer = self.config, self.model.tokenizer
        noise = None
        if config.posterior:
            grid = tokenizer.grid(*x.shape[-2:])
            noise = _latent_noise(rows, x.new_empty(len(x), tokenizer.autoencoder.dim, *grid))
        with torch.no_grad(), torch.autocast(x.device.type, enabled=False):
            latents = tokenizer.encode_tensor(x, noise)
        kept = [
            "" if float(torch.rand((), generator=row)) < config.drop else caption
            for row, caption in zip(rows, captions, strict=True)
        ]
        draws = tokenizer.draw(len(x), latents.values.shape[1], moment.once(), rows)
        terms = tokenizer(latents.values, latents.grid, draws, self.model.condition(kept))
        return {"noise": terms.noise, "bound": terms.bound}

    @torch.no_grad()
    def begin(self, networks: Networks, stage: int, start: int) -> list[dict[str, Any]]:
        """After the autoencoder's stage the scale is one over the standard deviation of the next step's latents."""
        if stage == 0 or not self.learns_latents(stage):
            return []
        sums = torch.zeros(3, dtype=torch.float64, device=self.accelerator.device)
        batches = itertools.islice(self.batches(stage, start), self.run.accumulate)
        rank, world = rank_and_world()
        for index, batch in enumerate(batches):
            posterior = networks["generator"].tokenizer.autoencoder.posterior(batch.images.to(sums.device))
            moment = Moment(self.run.seed, stage, 0, row=(index * world + rank) * self.run.batch_size)
            values = posterior.sample(_latent_noise(moment.rows(len(batch.images)), posterior.mean)).double()
            sums += torch.stack([values.new_tensor(values.numel()), values.sum(), values.square().sum()])
        count, total, squares = sum_over_ranks(sums).tolist()
        self._set_scale(self.model, ((squares - total**2 / count) / (count - 1)) ** -0.5)
        return [{"latent_scale": self.model.tokenizer.config.latent_scale}]

    def averages(self, stage: int) -> bool:
        return self.learns_latents(stage)

    def state_dict(self) -> dict[str, Any]:
        return super().state_dict() | {"latent_scale": self.model.tokenizer.config.latent_scale}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self._set_scale(self.model, state["latent_scale"])

    def _set_scale(self, model: Generator, latent_scale: float) -> None:
        model.tokenizer.config = dataclasses.replace(model.tokenizer.config, latent_scale=latent_scale)

    def show(self, networks: Networks, path: Path) -> None:
        """Images through the autoencoder; drawing comes at the end."""
        if self.shown is not None:
            self._set_scale(networks["generator"], self.model.tokenizer.config.latent_scale)
            show_reconstructions(networks["generator"].tokenizer, self.shown, path)

    def save(self, networks: Networks, folder: Path) -> None:
        """The tokenizer in our format, the captions' embedding beside it, and drawn scenes."""
        averaged = networks["generator"]
        self._set_scale(averaged, self.model.tokenizer.config.latent_scale)
        averaged.eval().tokenizer.save(folder / "tokenizer")
        save_tensors(averaged.captions.state_dict(), folder / "captions.safetensors")
        config, summary = self.config, {}
        if config.scenes:
            from tokenizers_mm.eval.drawings import Drawer, draw_scenes  # matplotlib

            assert config.data.image_size is not None
            drawer = Drawer(averaged.tokenizer, averaged.condition, config.sampling, config.data.image_size[0])
            zooms = [source.zoom for source in config.data.sources if source.kind == "photographs"]
            summary = draw_scenes(drawer, config.scenes, self.run.seed, folder, zooms[0] if zooms else None)
        write_json(folder / "summary.json", summary)


def _tokenizer(config: MARTrainingConfig) -> MAR:
    where = "config.objective"
    tokenizer = load(Path(config.start_from) / "tokenizer") if config.start_from else MAR.from_config(config.model)
    if not isinstance(tokenizer, MAR):
        fail(f"{where}.start_from", "a MAR tokenizer", tokenizer.family)
    given = dataclasses.replace(config.model, latent_scale=tokenizer.config.latent_scale)
    same = config.model == MARConfig() or given == tokenizer.config
    require(same, f"{where}.model", f"nothing, or that of {config.start_from}", "another")
    if config.autoencoder.kl16:
        state = read_kl16(config.autoencoder.kl16).state_dict()
        try:
            tokenizer.autoencoder.load_state_dict(state)
        except RuntimeError as error:
            fail(f"{where}.autoencoder.kl16", f"the sizes of {where}.model", str(error))
    return tokenizer


def _captions(config: MARTrainingConfig, width: int) -> CaptionEmbedding:
    captions = CaptionEmbedding(width, config.captions)
    if config.start_from:
        path = Path(config.start_from) / "captions.safetensors"
        require(
            path.is_file(), "config.objective.start_from", f"the folder of a run, with {path.name}", config.start_from
        )
        try:
            captions.load_state_dict(read_safetensors(path))
        except RuntimeError as error:
            fail("config.objective.captions", f"the sizes of {path}", str(error))
    return captions


def _latent_noise(rows: Sequence[torch.Generator], like: Tensor) -> Tensor:
    """Standard normal, of the shape [B, D, h, w] and on the device of `like`."""
    return torch.stack([torch.randn(like.shape[1:], generator=row) for row in rows]).to(like.device)
