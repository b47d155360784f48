"""Everything that changes during a run, in one place, and how it is built."""

from dataclasses import dataclass, field
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from tokenizers_mm.encoders.semantic import SemanticEncoder, SemanticEncoderConfig, load_pretrained
from tokenizers_mm.functional.usage import perplexity, usage
from tokenizers_mm.losses.captions import CaptionContrast
from tokenizers_mm.losses.discriminators import PatchGAN
from tokenizers_mm.losses.perceptual import load_lpips
from tokenizers_mm.models import ImageTokenizer

from .config import OptimizerConfig, TeacherConfig, TrainConfig
from .objective import Objective
from .start import build_tokenizer
from .upkeep import CodebookUpkeep


@dataclass
class TrainState:
    """The networks, optimizers and counters of a run. others: more things with a state_dict that learn beside them."""

    config: TrainConfig
    accelerator: Accelerator
    tokenizer: ImageTokenizer[Any]
    objective: Objective
    optimizer: torch.optim.Optimizer
    discriminator: nn.Module | None
    discriminator_optimizer: torch.optim.Optimizer | None
    ema: AveragedModel | None
    upkeep: CodebookUpkeep
    generator: torch.Generator
    step: int = 0
    seconds: float = 0.0
    counts: dict[str, torch.Tensor] = field(default_factory=dict)
    others: dict[str, Any] = field(default_factory=dict)

    @property
    def averaged(self) -> ImageTokenizer[Any]:
        """The tokenizer to save and to look at: the moving average where there is one."""
        return self.tokenizer if self.ema is None else self.ema.module  # type: ignore[return-value]

    def parts(self) -> dict[str, Any]:
        """All things with a state_dict, by name."""
        things = {
            "tokenizer": self.tokenizer,
            "optimizer": self.optimizer,
            "captions": self.objective.captions,
            "discriminator": self.discriminator,
            "discriminator_optimizer": self.discriminator_optimizer,
            "ema": self.ema,
            "upkeep": self.upkeep,
            "scaler": getattr(self.accelerator, "scaler", None),
            **self.others,
        }
        return {name: thing for name, thing in things.items() if thing is not None}

    def values(self) -> dict[str, Any]:
        """All else that changes: counts of codes and the state of chance."""
        return {"counts": self.counts, "generator": self.generator.get_state(), "rng": torch.get_rng_state()}

    def set_values(self, values: dict[str, Any]) -> None:
        """Put them back."""
        self.counts = values["counts"]
        self.generator.set_state(values["generator"])
        torch.set_rng_state(values["rng"])

    def take_usage(self) -> dict[str, float]:
        """Usage and perplexity of the codes since it was last asked."""
        line: dict[str, float] = {}
        for name, counts in self.counts.items():
            line[f"usage_{name}"], line[f"perplexity_{name}"] = usage(counts), perplexity(counts)
        self.counts.clear()
        return line


def build_state(config: TrainConfig, accelerator: Accelerator) -> TrainState:
    """Build everything from the configuration, on the accelerator's device."""
    torch.manual_seed(config.seed)
    device = accelerator.device
    tokenizer = build_tokenizer(config.model).to(device).train()
    _freeze(tokenizer, config.trainable)
    objective = _objective(config, tokenizer, device)
    learning = [p for p in tokenizer.parameters() if p.requires_grad]
    if objective.captions is not None:
        learning += list(objective.captions.parameters())
    optimizer = adam(learning, config.optimizer)
    discriminator = discriminator_optimizer = None
    if config.loss.weights.generator:
        discriminator = PatchGAN(config.loss.discriminator).to(device)
        own = config.discriminator_optimizer or config.optimizer
        discriminator_optimizer = adam(list(discriminator.parameters()), own)
    ema = None
    if config.ema:
        ema = AveragedModel(tokenizer, multi_avg_fn=get_ema_multi_avg_fn(config.ema), use_buffers=True)
        ema.eval()
    return TrainState(
        config,
        accelerator,
        tokenizer,
        objective,
        optimizer,
        discriminator,
        discriminator_optimizer,
        ema,
        CodebookUpkeep.for_tokenizer(tokenizer),
        torch.Generator().manual_seed(config.seed),
    )


def _freeze(tokenizer: nn.Module, trainable: tuple[str, ...]) -> None:
    if not trainable:
        return
    names = [name for name, _ in tokenizer.named_parameters()]
    unknown = [prefix for prefix in trainable if not any(name.startswith(prefix) for name in names)]
    if unknown:
        raise ValueError(f"config.trainable: expected prefixes of parameter names, got {unknown}")
    for name, parameter in tokenizer.named_parameters():
        parameter.requires_grad_(name.startswith(trainable))


def _objective(config: TrainConfig, tokenizer: ImageTokenizer[Any], device: torch.device) -> Objective:
    loss = config.loss
    objective = Objective(loss)
    if loss.weights.perceptual:
        objective.perceptual = load_lpips(loss.lpips_weights or None).to(device)
    if loss.weights.semantic and loss.semantic == "teacher":
        assert loss.teacher is not None
        objective.teacher = _teacher(loss.teacher).to(device)
    if loss.weights.semantic and loss.semantic == "captions":
        size = tokenizer.image_size or (256, 256)
        with torch.no_grad():
            dim = tokenizer(torch.zeros(1, 3, *size, device=device)).semantic.shape[-1]
        objective.captions = CaptionContrast(dim, loss.captions).to(device)
    return objective


def _teacher(config: TeacherConfig) -> SemanticEncoder:
    options = {"name": config.name, "options": config.options, "mean": config.mean, "std": config.std}
    teacher = SemanticEncoder(SemanticEncoderConfig(**options, features=config.features, pretrained=config.pretrained))  # type: ignore[arg-type]
    if config.pretrained:
        load_pretrained(teacher)
    return teacher.requires_grad_(False).eval()


def adam(parameters: list[nn.Parameter] | list[dict[str, Any]], options: OptimizerConfig) -> torch.optim.Optimizer:
    """AdamW as the options say; parameters may be in groups with options of their own."""
    return torch.optim.AdamW(parameters, lr=options.lr, betas=options.betas, weight_decay=options.weight_decay)
