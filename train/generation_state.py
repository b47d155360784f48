"""What learns in a run of `train.generation`, everything that changes with it, and how that is kept in files."""

import dataclasses
import re
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

import torch
from accelerate import Accelerator
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from tokenizers_mm import load
from tokenizers_mm._files import atomic_path
from tokenizers_mm.checkpoints.mar import read_kl16
from tokenizers_mm.models.mar import MAR, decay_groups

from .checkpoint import read_newest, restore_parts, write_checkpoint
from .generation_config import CaptionEmbeddingConfig, GenerationConfig

Stage = Literal["autoencoder", "mar"]


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


@dataclass
class GenerationState:
    """The networks, the optimizer and the counters of a run; all chance is a function of the counters.

    autoencoder_steps, mar_steps: done in each stage. seconds: of the present stage. average: in MAR's stage.
    """

    config: GenerationConfig
    accelerator: Accelerator
    model: Generator
    optimizer: torch.optim.Optimizer
    average: AveragedModel | None = None
    stage: Stage = "autoencoder"
    autoencoder_steps: int = 0
    mar_steps: int = 0
    seconds: float = 0.0

    @property
    def step(self) -> int:
        """Steps done in the present stage."""
        return self.autoencoder_steps if self.stage == "autoencoder" else self.mar_steps

    @property
    def total(self) -> int:
        """Steps done in all: the number of a checkpoint, and the place in the data."""
        return self.autoencoder_steps + self.mar_steps

    @property
    def averaged(self) -> Generator:
        """The moving average of MAR's stage, in evaluation mode."""
        assert self.average is not None
        return cast(Generator, self.average.module).eval()


def build_state(config: GenerationConfig, accelerator: Accelerator) -> GenerationState:
    """Build everything for the first stage of the configuration, on the accelerator's device."""
    torch.manual_seed(config.seed)
    tokenizer = _tokenizer(config)
    model = Generator(tokenizer, _captions(config, tokenizer.feature_dim)).to(accelerator.device)
    optimizer = torch.optim.AdamW(
        tokenizer.autoencoder.parameters(), lr=config.autoencoder.lr, betas=(0.9, 0.95), weight_decay=0.0
    )
    state = GenerationState(config, accelerator, model, optimizer)
    if not config.autoencoder.steps:
        begin_mar(state, tokenizer.config.latent_scale)
    return state


def begin_mar(state: GenerationState, latent_scale: float) -> None:
    """Freeze the autoencoder, set the scale of its latents, and take up MAR's optimizer and moving average."""
    tokenizer, options = state.model.tokenizer, state.config.optimizer
    tokenizer.config = dataclasses.replace(tokenizer.config, latent_scale=latent_scale)
    tokenizer.autoencoder.requires_grad_(False).eval()
    groups = decay_groups(state.model, options.weight_decay, "tokenizer.")
    state.optimizer = torch.optim.AdamW(groups, options.lr, options.betas)
    state.average = AveragedModel(state.model, multi_avg_fn=get_ema_multi_avg_fn(state.config.ema))
    state.stage, state.seconds = "mar", 0.0


def save_checkpoint(state: GenerationState) -> None:
    """A checkpoint and, in MAR's stage, the averaged networks as users read them. Called on every rank; 0 writes."""
    state.accelerator.wait_for_everyone()
    if not state.accelerator.is_main_process:
        return
    data = {name: part.state_dict() for name, part in _parts(state).items()}
    data |= {name: getattr(state, name) for name in ("stage", "autoencoder_steps", "mar_steps", "seconds")}
    data["latent_scale"] = state.model.tokenizer.config.latent_scale
    write_checkpoint(state.config.out, state.total, data, state.config, state.config.keep)
    if state.stage == "mar":
        save_networks(state.averaged, Path(state.config.out))


def resume(state: GenerationState) -> bool:
    """Take up the newest checkpoint of the run, if there is one, in whichever stage it was."""
    data = read_newest(state.config.out)
    if data is None:
        return False
    counters = ("stage", "autoencoder_steps", "mar_steps", "seconds")
    if data.get("stage") == "mar":
        begin_mar(state, data["latent_scale"])
    elif state.stage == "mar":
        raise ValueError("config.autoencoder.steps: expected some, as the checkpoint is of that stage, got 0")
    restore_parts(_parts(state), data, (*counters, "latent_scale"))
    for name in counters:
        setattr(state, name, data[name])
    return True


def save_networks(model: Generator, folder: Path) -> None:
    """The tokenizer in our format, and the captions' embedding beside it."""
    model.tokenizer.save(folder / "tokenizer")
    with atomic_path(folder / "captions.safetensors") as path:
        save_file({n: t.detach().cpu().contiguous() for n, t in model.captions.state_dict().items()}, path)


def _parts(state: GenerationState) -> dict[str, Any]:
    """All things with a state_dict, by name."""
    things = {
        "model": state.model,
        "optimizer": state.optimizer,
        "average": state.average,
        "scaler": getattr(state.accelerator, "scaler", None),
    }
    return {name: thing for name, thing in things.items() if thing is not None}


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
