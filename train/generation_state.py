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
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from tokenizers_mm import load
from tokenizers_mm.checkpoints.mar import read_kl16
from tokenizers_mm.models.mar import MAR, decay_groups
from tokenizers_mm.models.saving import save_tensors

from .generation_config import CaptionEmbeddingConfig, GenerationConfig
from .state import adam

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
    """The networks, optimizers and counters of a run; all chance is a function of the counters.

    step: over both stages. begun: the step with which the present stage began. seconds: of the present stage.
    """

    config: GenerationConfig
    accelerator: Accelerator
    model: Generator
    average: AveragedModel
    autoencoder_optimizer: torch.optim.Optimizer
    optimizer: torch.optim.Optimizer
    stage: Stage = "autoencoder"
    begun: int = 0
    step: int = 0
    seconds: float = 0.0

    @property
    def within(self) -> int:
        """Steps done in the present stage."""
        return self.step - self.begun

    @property
    def averaged(self) -> Generator:
        """The moving average of MAR's stage, in evaluation mode."""
        return cast(Generator, self.average.module).eval()

    def parts(self) -> dict[str, Any]:
        """All things with a state_dict, by name."""
        things = {
            "model": self.model,
            "average": self.average,
            "autoencoder_optimizer": self.autoencoder_optimizer,
            "optimizer": self.optimizer,
            "scaler": getattr(self.accelerator, "scaler", None),
        }
        return {name: thing for name, thing in things.items() if thing is not None}

    def values(self) -> dict[str, Any]:
        """All else that changes."""
        return {"stage": self.stage, "begun": self.begun, "latent_scale": self.model.tokenizer.config.latent_scale}

    def set_values(self, values: dict[str, Any]) -> None:
        """Put them back."""
        self.stage, self.begun = values["stage"], values["begun"]
        self._set_scale(values["latent_scale"])

    def begin_mar(self, latent_scale: float) -> None:
        """From here on the autoencoder and the scale of its latents stay, and MAR learns."""
        self.stage, self.begun, self.seconds = "mar", self.step, 0.0
        self._set_scale(latent_scale)

    def _set_scale(self, latent_scale: float) -> None:
        for model in (self.model, self.averaged):
            model.tokenizer.config = dataclasses.replace(model.tokenizer.config, latent_scale=latent_scale)
        self.model.tokenizer.autoencoder.requires_grad_(self.stage == "autoencoder")


def build_state(config: GenerationConfig, accelerator: Accelerator) -> GenerationState:
    """Build everything for the first stage of the configuration, on the accelerator's device."""
    torch.manual_seed(config.seed)
    tokenizer = _tokenizer(config)
    model = Generator(tokenizer, _captions(config, tokenizer.feature_dim)).to(accelerator.device)
    autoencoder_optimizer = adam(list(tokenizer.autoencoder.parameters()), config.autoencoder.optimizer)
    tokenizer.autoencoder.requires_grad_(False)
    optimizer = adam(decay_groups(model, config.optimizer.weight_decay, "tokenizer."), config.optimizer)
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(config.ema))
    tokenizer.autoencoder.requires_grad_(True)
    state = GenerationState(config, accelerator, model, average, autoencoder_optimizer, optimizer)
    if not config.autoencoder.steps:
        state.begin_mar(tokenizer.config.latent_scale)
    return state


def save_networks(model: Generator, folder: Path) -> None:
    """The tokenizer in our format, and the captions' embedding beside it."""
    model.tokenizer.save(folder / "tokenizer")
    save_tensors(model.captions.state_dict(), folder / "captions.safetensors")


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
