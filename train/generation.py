"""`python -m train.generation CONFIG [key=value ...]`: MAR learns to fill in images, with or without captions.

First the autoencoder, if asked, then MAR on its frozen latents: AdamW, moving average, captions dropped now and then
for guidance. Leaves log.jsonl, curves.png, samples and the finished tokenizer in the run's folder.
"""

import dataclasses
import json
import re
import sys
import time
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from tokenizers_mm import load
from tokenizers_mm._files import atomic_path
from tokenizers_mm._images import image_to_tensor, tensor_to_images
from tokenizers_mm.checkpoints.mar import read_kl16
from tokenizers_mm.config import from_mapping, read_yaml
from tokenizers_mm.data.scenes import make_scene
from tokenizers_mm.data.sources import Batch, DataConfig, Mixture, Positions, make_loader
from tokenizers_mm.eval.pictures import comparison_grid, plot_curves, save_picture
from tokenizers_mm.eval.scenes import judge_scene
from tokenizers_mm.models.mar import MAR, MARConfig, decay_groups
from tokenizers_mm.models.mar_sampling import SamplingConfig, draw_noise, plan_all, plan_masked, sample

from .config import OptimizerConfig
from .schedule import learning_rate


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


@dataclass(frozen=True)
class GenerationConfig:
    """A run.

    start_from: the folder of a run whose networks to go on from, "" for new ones. drop: share of captions dropped.
    posterior: sample latents in training (MAR) or take the mean (Harmon). ema: decay of the saved average.
    max_seconds: of MAR's stage, 0 for no limit. precision: of autocast in it. save_every: steps between saves of the
    averaged tokenizer, 0 for the end only. scenes: how many held-out scene captions are drawn at the end, to be looked
    at and their colours counted.
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
    posterior: bool = True
    drop: float = 0.1
    ema: float = 0.999
    seed: int = 0
    device: str = "cpu"
    precision: Literal["fp32", "bf16"] = "fp32"
    log_every: int = 10
    save_every: int = 0
    scenes: int = 0


class CaptionEmbedding(nn.Module):
    """Captions to condition vectors [B, C] for MAR's buffers: a sum of words at places, and a small MLP."""

    def __init__(self, width: int, config: CaptionEmbeddingConfig) -> None:
        super().__init__()
        self.config = config
        self.words = nn.EmbeddingBag(config.buckets, width, mode="sum")
        self.mlp = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width))
        nn.init.normal_(self.words.weight, std=0.2)

    def forward(self, captions: Sequence[str]) -> Tensor:
        rows = [re.findall(r"\w+", caption.lower())[: self.config.max_words] for caption in captions]
        ids = [[zlib.crc32(f"{i} {w}".encode()) % self.config.buckets for i, w in enumerate(row)] for row in rows]
        flat = torch.tensor([number for row in ids for number in row], dtype=torch.int64)
        starts = torch.tensor([0, *[len(row) for row in ids[:-1]]]).cumsum(0)
        device = self.words.weight.device
        return self.mlp(self.words(flat.to(device), starts.to(device)))


class Generator(nn.Module):
    """What learns: a MAR tokenizer and the captions' embedding."""

    def __init__(self, tokenizer: MAR, captions: CaptionEmbedding) -> None:
        super().__init__()
        self.tokenizer, self.captions = tokenizer, captions

    def condition(self, captions: Sequence[str]) -> Tensor:
        """Vectors [B, C]; an empty caption is none."""
        present = torch.tensor([bool(caption) for caption in captions], device=self.tokenizer.device)
        return torch.where(present[:, None], self.captions(captions), self.tokenizer.encoder.no_class)


def run(config: GenerationConfig) -> dict[str, Any]:
    """Both stages, then samples; returns what summary.json holds."""
    torch.manual_seed(config.seed)
    folder = Path(config.out)
    tokenizer = _tokenizer(config).to(config.device)
    model = Generator(tokenizer, _captions(config, tokenizer.feature_dim).to(config.device))
    batches = _batches(config)
    log = _Log(folder)
    if config.autoencoder.steps:
        _train_autoencoder(config, tokenizer, batches, log)
    tokenizer.autoencoder.requires_grad_(False).eval()
    averaged, seconds = _train(config, model, batches, log)
    log.curves()
    _save(averaged, folder)
    summary = {"seconds": round(seconds, 1), **_look(config, averaged, folder)}
    with atomic_path(folder / "summary.json") as path:
        path.write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")
    return summary


def _train_autoencoder(config: GenerationConfig, tokenizer: MAR, batches: Iterator[Batch], log: "_Log") -> None:
    stage, autoencoder = config.autoencoder, tokenizer.autoencoder
    optimizer = torch.optim.AdamW(autoencoder.parameters(), lr=stage.lr, betas=(0.9, 0.95), weight_decay=0.0)
    schedule = OptimizerConfig(lr=stage.lr, schedule="cosine", warmup=20)
    for step in range(stage.steps):
        x = next(batches).images.to(config.device)
        posterior = autoencoder.posterior(x)
        pixel = (autoencoder.decode(posterior.sample(torch.randn_like(posterior.mean))) - x).abs().mean()
        divergence = posterior.kl().mean() / x[0].numel()
        rate = learning_rate(schedule, step, step / stage.steps)
        _step(optimizer, pixel + stage.kl_weight * divergence, rate, clip=1.0)
        log.add(step, config.log_every, {"autoencoder pixel": pixel, "autoencoder divergence": divergence})
    with torch.no_grad():
        x = next(batches).images.to(config.device)
        scale = 1 / float(autoencoder.posterior(x).sample(torch.randn_like(posterior.mean)).std())
    tokenizer.config = dataclasses.replace(tokenizer.config, latent_scale=scale)


def _train(
    config: GenerationConfig, model: Generator, batches: Iterator[Batch], log: "_Log"
) -> tuple[Generator, float]:
    """MAR's stage; the moving average, and how long it took."""
    optimizer = torch.optim.AdamW(
        decay_groups(model, config.optimizer.weight_decay, "tokenizer."), config.optimizer.lr, config.optimizer.betas
    )
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(config.ema))
    generator = torch.Generator().manual_seed(config.seed)
    started = time.perf_counter()
    for step in range(config.steps):
        seconds = time.perf_counter() - started
        if config.max_seconds and seconds > config.max_seconds:
            break
        model.train()
        model.tokenizer.autoencoder.eval()
        batch = next(batches)
        with torch.no_grad():
            latents = _latents(model.tokenizer, batch.images.to(config.device), config.posterior)
        kept = [
            "" if float(torch.rand((), generator=generator)) < config.drop else caption for caption in batch.captions
        ]
        draws = model.tokenizer.draw(latents.values.shape[0], latents.values.shape[1], generator)
        with torch.autocast(config.device, torch.bfloat16, enabled=config.precision == "bf16"):
            terms = model.tokenizer(latents.values, latents.grid, draws, model.condition(kept))
        progress = (
            step / config.steps if not config.max_seconds else max(step / config.steps, seconds / config.max_seconds)
        )
        rate = learning_rate(config.optimizer, step, progress)
        _step(optimizer, terms.noise + terms.bound, rate, config.optimizer.clip)
        average.update_parameters(model)
        log.add(step, config.log_every, {"noise": terms.noise, "bound": terms.bound})
        if config.save_every and (step + 1) % config.save_every == 0:
            _save(average.module, Path(config.out))  # type: ignore[arg-type]
    return average.module.eval(), time.perf_counter() - started  # type: ignore[return-value]


@torch.no_grad()
def _look(config: GenerationConfig, model: Generator, folder: Path) -> dict[str, Any]:
    """Masked halves filled in, samples of held-out captions, and the share of right colours."""
    if not config.scenes:
        return {}
    tokenizer, options = model.tokenizer, config.sampling
    scenes = [make_scene(index, "heldout") for index in range(config.scenes)]
    real = torch.stack([_picture(scene, config.image_size) for scene in scenes]).to(config.device)
    captions = [scene.caption for scene in scenes]
    generator = torch.Generator().manual_seed(config.seed)
    latents = tokenizer.encode(real)
    batch, length, dim = latents.values.shape
    half = torch.zeros(batch, length, dtype=torch.bool, device=config.device)
    half[:, length // 2 :] = True
    condition = model.condition(captions)
    if options.guidance != 1:
        condition = torch.cat([condition, tokenizer.encoder.no_class.expand_as(condition)])

    def encode(tokens: Tensor, mask: Tensor) -> Tensor:
        return tokenizer.encoder(tokens, latents.grid, mask, condition)

    def fill(plan: Any) -> Tensor:
        tokens = sample(tokenizer, encode, latents.grid, plan, options, draw_noise(dim, generator, config.device))
        return tokenizer.decode(tokenizer.latents(tokens.to(tokenizer.dtype), latents.grid)).clamp(-1, 1)

    filled = fill(plan_masked(latents.values, half, generator))
    drawn = fill(plan_all(tokenizer, batch, latents.grid, generator))
    decoded = tokenizer.decode(latents).clamp(-1, 1)
    save_picture(comparison_grid(real[:16], decoded[:16], zoom=2), folder / "autoencoder.png")
    save_picture(comparison_grid(real[:16], filled[:16], zoom=2), folder / "lower_halves.png")
    save_picture(comparison_grid(real[:16], drawn[:16], zoom=2), folder / "samples.png")
    wanted = [scene.objects[0].colour for scene in scenes]

    def share(images: Tensor) -> float:
        judged = [judge_scene(picture) for picture in tensor_to_images(images)]
        return sum(
            found is not None and found[1] == colour for found, colour in zip(judged, wanted, strict=True)
        ) / len(wanted)

    return {
        "scenes": len(scenes),
        "right_colour_real": share(real),
        "right_colour_decoded": share(decoded),
        "right_colour_sampled": share(drawn),
    }


def _latents(tokenizer: MAR, x: Tensor, posterior: bool) -> Any:
    if not posterior:
        return tokenizer.encode_tensor(x)
    rows, columns = tokenizer.grid(*x.shape[-2:])
    return tokenizer.encode_tensor(x, torch.randn(len(x), tokenizer.autoencoder.dim, rows, columns, device=x.device))


def _step(optimizer: torch.optim.Optimizer, loss: Tensor, rate: float, clip: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = rate
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    nn.utils.clip_grad_norm_([p for g in optimizer.param_groups for p in g["params"]], clip, error_if_nonfinite=True)
    optimizer.step()


def _tokenizer(config: GenerationConfig) -> MAR:
    tokenizer = load(Path(config.start_from) / "tokenizer") if config.start_from else MAR.from_config(config.model)
    if not isinstance(tokenizer, MAR):
        raise ValueError(f"config.start_from: expected a MAR tokenizer, got {tokenizer.family}")
    if config.autoencoder.kl16:
        state = read_kl16(config.autoencoder.kl16).state_dict()
        try:
            tokenizer.autoencoder.load_state_dict(state)
        except RuntimeError as error:
            raise ValueError(f"config.autoencoder.kl16: expected the sizes of config.model, got {error}") from None
    return tokenizer


def _captions(config: GenerationConfig, width: int) -> CaptionEmbedding:
    captions = CaptionEmbedding(width, config.captions)
    if config.start_from:
        path = Path(config.start_from) / "captions.safetensors"
        if not path.is_file():
            raise ValueError(f"config.start_from: expected the folder of a run, got none with {path}")
        try:
            captions.load_state_dict(load_file(path))
        except RuntimeError as error:
            raise ValueError(f"config.captions: expected the sizes of {path}, got {error}") from None
    return captions


def _save(model: Generator, folder: Path) -> None:
    """The tokenizer in our format, and the captions' embedding beside it."""
    model.tokenizer.save(folder / "tokenizer")
    with atomic_path(folder / "captions.safetensors") as path:
        save_file({n: t.detach().cpu().contiguous() for n, t in model.captions.state_dict().items()}, path)


def _batches(config: GenerationConfig) -> Iterator[Batch]:
    dataset = Mixture(config.data, (config.image_size, config.image_size), config.seed)
    return iter(make_loader(dataset, Positions(config.batch_size)))


def _picture(scene: Any, side: int) -> Tensor:
    return image_to_tensor(scene.render(side))


class _Log:
    """Means of the reported values every few steps, as JSON lines and as a picture."""

    def __init__(self, folder: Path) -> None:
        self.folder, self._sums, self._count = folder, {}, 0
        self._curves: dict[str, list[tuple[float, float]]] = {}
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "log.jsonl").unlink(missing_ok=True)

    def add(self, step: int, every: int, values: dict[str, Tensor]) -> None:
        """Take the values of a step; a new stage forgets what the last one has not written."""
        if self._sums.keys() != values.keys():
            self._sums, self._count = {}, 0
        for name, value in values.items():
            self._sums[name] = self._sums.get(name, 0.0) + float(value.detach())
        self._count += 1
        if (step + 1) % every:
            return
        means = {name: value / self._count for name, value in self._sums.items()}
        with open(self.folder / "log.jsonl", "a", encoding="utf-8") as stream:
            stream.write(json.dumps({"step": step + 1, **means}) + "\n")
        for name, value in means.items():
            self._curves.setdefault(name, []).append((step + 1, value))
        print(f"{step + 1}: " + ", ".join(f"{n} {v:.4g}" for n, v in means.items()), file=sys.stderr)
        self._sums, self._count = {}, 0

    def curves(self) -> None:
        """Draw all curves, if there are any."""
        if self._curves:
            plot_curves(self._curves, self.folder / "curves.png")


def main(arguments: list[str]) -> int:
    """Read the configuration and train. Bad input ends with one sentence and code 2."""
    try:
        if not arguments:
            raise ValueError("config: expected the path of a YAML file, got nothing")
        print(json.dumps(run(from_mapping(GenerationConfig, read_yaml(arguments[0], arguments[1:]), "config"))))
    except ValueError as error:
        print(f"train.generation: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
