"""Training of a language model on rows of text and images: next-token prediction or masked diffusion."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from tokenizers_mm import load
from tokenizers_mm._check import require
from tokenizers_mm._ranks import rank_and_world
from tokenizers_mm.config import Range
from tokenizers_mm.data.sources import Positions
from tokenizers_mm.llm import (
    Batch,
    FeatureProjector,
    MultimodalProcessor,
    ProjectorConfig,
    TrainableRows,
)
from tokenizers_mm.llm.batch import IGNORED, Row, pad_rows
from tokenizers_mm.llm.building import (
    LanguageModelConfig,
    build_language_model,
    language_model_size,
    save_language_model,
)
from tokenizers_mm.llm.diffuse import diffusion_loss
from tokenizers_mm.llm.loss import next_token_loss, num_predicted
from tokenizers_mm.llm.model import add_lora
from tokenizers_mm.llm.packing import pack_rows
from tokenizers_mm.llm.projector import embed
from tokenizers_mm.llm.records import RecordMixture, Records
from tokenizers_mm.llm.transformers_api import embeddings
from tokenizers_mm.models.starting import saved_size

from ..config import RunConfig
from ..optim import Learner, OptimizerConfig
from .base import Moment, Networks, Objective, Player, Terms

LANGUAGE_MODEL = "config.objective.language_model"
"""Place of its configuration, as errors call it."""


@dataclass(frozen=True)
class RecordConfig:
    """A file of interleaved records (see `tokenizers_mm.llm.records`) and its share of the rows.

    outside: whether its images may lie outside of its folder. any_tokenizer: whether codes that another tokenizer made
    are taken, too.
    """

    path: str
    weight: Annotated[float, Range(0)] = 1.0
    outside: bool = False
    any_tokenizer: bool = False


@dataclass(frozen=True)
class LanguageConfig:
    """tokenizer: directory or hub id of the image tokenizer, which stays as it is. method: next-token prediction, or
    masked diffusion with `mask_token` of the text tokenizer. learns: all weights, only the visual rows, or low-rank
    adapters (of `lora_rank`) and the visual rows.

    fit: for images of a size that the vocabulary lacks. projector: activation of the projector of features, where
    records show images as features. features: the tokenizer's own, or those of its streams as parts (DualViTok).
    pack: tokens per packed sequence, 0 to pad instead.
    """

    tokenizer: str
    language_model: LanguageModelConfig
    records: tuple[RecordConfig, ...]
    kind: Literal["language"] = "language"
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    method: Literal["next_token", "masked_diffusion"] = "next_token"
    mask_token: str = ""
    learns: Literal["all", "new_rows", "lora"] = "all"
    lora_rank: Annotated[int, Range(1, 4096)] = 16
    fit: Literal["refuse", "crop", "pad", "resize"] = "refuse"
    projector: Literal["none", "gelu", "silu"] = "none"
    features: Literal["tokenizer", "streams"] = "tokenizer"
    pack: Annotated[int, Range(0)] = 0


class Learning:
    """Weights that learn, by name: a checkpoint holds these and not the frozen ones."""

    def __init__(self, networks: dict[str, nn.Module]) -> None:
        self.networks = networks

    @property
    def parameters(self) -> dict[str, nn.Parameter]:
        """The weights; an engine may put others in their places."""
        return {name: p for name, p in nn.ModuleDict(self.networks).named_parameters() if p.requires_grad}

    def state_dict(self) -> dict[str, Tensor]:
        """The weights."""
        return {name: parameter.detach() for name, parameter in self.parameters.items()}

    @torch.no_grad()
    def load_state_dict(self, tensors: dict[str, Tensor]) -> None:
        """Restore them; names and shapes must be these."""
        mine = self.parameters
        common = {name for name in mine.keys() & tensors.keys() if mine[name].shape == tensors[name].shape}
        if other := sorted((mine.keys() | tensors.keys()) - common):
            raise ValueError(f"another {other[0]}")
        for name, parameter in mine.items():
            parameter.copy_(tensors[name])


class Language(Objective):
    """Networks: the language model (with adapters where they learn) and the projector of features."""

    kind = "language"
    Config = LanguageConfig
    FIXED = ("tokenizer", "language_model", "records", "method", "mask_token", "learns", "lora_rank", "fit",
             "projector", "features", "pack")  # fmt: skip
    config: LanguageConfig

    @classmethod
    def check_config(cls, run: RunConfig) -> None:
        config, where = run.objective, "config.objective"
        decay, rows = config.optimizer.weight_decay, config.learns == "new_rows"
        require(not rows or not decay, f"{where}.optimizer.weight_decay", "0 for learns: new_rows", decay)
        require(not rows or run.engine == "ddp", "config.engine", "ddp for learns: new_rows (text rows stay by hooks)",
                run.engine)  # fmt: skip
        diffusion = config.method == "masked_diffusion"
        require(not diffusion or config.projector == "none", f"{where}.projector", "none for masked diffusion",
                config.projector)  # fmt: skip
        require(diffusion == bool(config.mask_token), f"{where}.mask_token",
                "a token of the text tokenizer, for masked_diffusion", config.mask_token or "nothing")  # fmt: skip
        rank = LanguageConfig.lora_rank
        fitting = config.learns == "lora" or config.lora_rank == rank
        require(fitting, f"{where}.lora_rank", "nothing where learns is not lora", config.lora_rank)
        shown = config.projector != "none" or config.features == "tokenizer"
        require(shown, f"{where}.features", "tokenizer where there is no projector", config.features)

    @classmethod
    def sizes(cls, run: RunConfig) -> dict[str, int | str]:
        config = run.objective
        return {
            "tokenizer (frozen)": saved_size(config.tokenizer),
            "language model": language_model_size(config.language_model, LANGUAGE_MODEL),
        }

    def __init__(self, run: RunConfig, accelerator: Accelerator) -> None:
        super().__init__(run, accelerator)
        config, device = self.config, accelerator.device
        tokenizer: Any = load(config.tokenizer).to(device)
        features = getattr(tokenizer, "stream_features", None) if config.features == "streams" else None
        by_stream = config.features == "tokenizer" or features is not None
        require(by_stream, "config.objective.features", "tokenizer (no streams here)", "streams")
        model, self.processor = build_language_model(
            config.language_model, tokenizer, LANGUAGE_MODEL, config.fit, features
        )
        self.mask_id = _mask_id(self.processor.text_tokenizer, config.mask_token)
        if config.learns == "lora":
            model = add_lora(model, self.processor.vocabulary, config.lora_rank)
        elif config.learns == "new_rows":
            TrainableRows(model, self.processor.vocabulary)
        self.model = model.to(device)
        self.networks: dict[str, nn.Module] = {"model": self.model}
        self.projector: FeatureProjector | None = None
        if config.projector != "none":
            width = embeddings(model).weight.shape[1]
            shape = ProjectorConfig(self.processor.feature_dims(), width, config.projector)
            self.projector = FeatureProjector(shape).to(device)
            self.networks["projector"] = self.projector
        self.learning = Learning(self.networks)

    def enter(self, stage: int) -> None:
        self.model.train()

    def saved(self) -> dict[str, Any]:
        return {"learning": self.learning}

    def learners(self, stage: int) -> dict[str, Learner]:
        return {"model": Learner(self.config.optimizer, list(self.learning.parameters.values()))}

    def players(self, moment: Moment) -> Sequence[Player]:
        return (Player("model", tuple(self.networks), ("model",)),)

    def weights(self, player: str, moment: Moment) -> dict[str, float]:
        return {self.config.method: 1.0}

    def batches(self, stage: int, start: int) -> Iterator[Batch]:
        config = self.config
        causal = config.method == "next_token"
        return record_batches(self, config.records, self.processor, start, config.pack, causal)

    def counts(self, player: str, batch: Batch) -> dict[str, int]:
        """Predicted labels; for masked diffusion, which weighs sequences alike, sequences."""
        count = num_predicted(batch.labels) if self.mask_id is None else len(batch)
        return {self.config.method: count, "labels": int((batch.labels != IGNORED).sum())}

    def check_labels(self, totals: Mapping[str, int], step: int) -> None:
        some = totals["labels"] > 0
        require(some, "records", "rows with something to learn (parts without learn: false)", f"none in step {step}")

    def losses(self, player: str, batch: Batch, moment: Moment) -> tuple[Terms, Terms]:
        batch = batch.to(self.accelerator.device)
        if self.mask_id is not None:
            loss = diffusion_loss(self.model, batch, self.mask_id, moment.rows(len(batch)))
        elif self.projector is None:
            loss = next_token_loss(self.model, batch.model_inputs())
        else:
            loss = next_token_loss(self.model, embed(self.model, batch, self.projector))
        return {self.config.method: loss}, {}

    def save(self, networks: Networks, folder: Path) -> None:
        """Model (adapters merged), text tokenizer, visual_vocab.json and projector, in the run's folder itself."""
        model = networks["model"]
        model = model.merge_and_unload() if self.config.learns == "lora" else model
        save_language_model(model, self.processor, networks.get("projector"), folder)


def record_batches(
    objective: Objective,
    records: Sequence[RecordConfig],
    processor: MultimodalProcessor,
    start: int,
    pack: int = 0,
    causal: bool = True,
) -> Iterator[Batch]:
    """Micro-batches of this process from row `start` of the mixture on, without end; a row's position decides it."""
    run, (rank, world) = objective.run, rank_and_world()
    sources = [
        (Records(source.path, processor.tokenizer, source.outside, source.any_tokenizer), source.weight)
        for source in records
    ]
    mixture = RecordMixture(sources, run.seed)
    for positions in Positions(run.batch_size, start, rank, world):
        rows: list[Row] = processor.rows([mixture[position] for position in positions])
        yield pack_rows(rows, pack, processor.pad, causal=causal) if pack else pad_rows(rows, processor.pad)


def _mask_id(text: Any, mask_token: str) -> int | None:
    """Token id of masked diffusion, None without one."""
    if not mask_token:
        return None
    mask_id = text.convert_tokens_to_ids(mask_token)
    known = mask_id is not None and mask_id != text.unk_token_id
    require(known, "config.objective.mask_token", "a token of the text tokenizer", mask_token)
    return mask_id
