"""Training of a language model on rows of text and images, to be read aloud."""

import json
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from tokenizers_mm import load
from tokenizers_mm._check import fail, require
from tokenizers_mm._files import atomic_path, write_json
from tokenizers_mm.config import to_mapping
from tokenizers_mm.llm import (
    Batch,
    FeatureProjector,
    MultimodalProcessor,
    OnlyNewRows,
    ProjectorConfig,
    VisualVocabulary,
    extend,
)
from tokenizers_mm.llm.batch import Row, pad_rows
from tokenizers_mm.llm.diffuse import diffusion_loss
from tokenizers_mm.llm.loss import next_token_loss
from tokenizers_mm.llm.model import add_lora
from tokenizers_mm.llm.packing import pack_rows
from tokenizers_mm.llm.projector import embed
from tokenizers_mm.llm.records import RecordMixture, Records

from .config import OptimizerConfig
from .schedule import learning_rate


@dataclass(frozen=True)
class LanguageModelConfig:
    """source: a directory or hub id of a causal language model; or, without one, `kind` and `config` of a new one.

    text_tokenizer: a directory or hub id; by default that of the source.
    """

    source: str = ""
    text_tokenizer: str = ""
    kind: str = ""
    config: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class RecordConfig:
    """A file of interleaved records (see `tokenizers_mm.llm.records`) and its share of the rows."""

    path: str
    weight: float = 1.0


@dataclass(frozen=True)
class BridgeConfig:
    """A run.

    out: its folder. tokenizer: directory or hub id of the image tokenizer, which stays as it is. objective: next-token
    prediction, or masked diffusion with `mask_token` of the text tokenizer. learns: all weights, only the visual rows,
    or low-rank adapters (of `lora_rank`) and the visual rows. projector: the activation of the projector of features,
    where records show images as features. pack: tokens per packed sequence, 0 to pad instead. batch_size: rows a step.
    """

    out: str
    tokenizer: str
    language_model: LanguageModelConfig
    records: tuple[RecordConfig, ...]
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    objective: Literal["next_token", "masked_diffusion"] = "next_token"
    mask_token: str = ""
    learns: Literal["all", "new_rows", "lora"] = "all"
    lora_rank: int = 16
    projector: Literal["none", "gelu", "silu"] = "none"
    pack: int = 0
    steps: int = 1000
    max_seconds: float = 0.0
    batch_size: int = 8
    seed: int = 0
    log_every: int = 20


@dataclass(frozen=True)
class FitConfig:
    """steps: optimizer steps at most. max_seconds: end (and finish the schedule) earlier, 0 for never.

    log_every: steps between reports, over which the loss is averaged.
    """

    optimizer: OptimizerConfig
    steps: int = 1000
    max_seconds: float = 0.0
    log_every: int = 20


def run_bridge(config: BridgeConfig) -> dict[str, float]:
    """Train to the end; leaves the model, the text tokenizer, visual_vocab.json and log.jsonl in the run's folder."""
    torch.manual_seed(config.seed)
    tokenizer = load(config.tokenizer)
    model, processor = build_language_model(config.language_model, tokenizer)
    batches = record_batches(config, processor)
    projector = None
    if config.projector != "none":
        parts = processor.feature_dims()
        width = model.get_input_embeddings().weight.shape[1]
        projector = FeatureProjector(ProjectorConfig(parts, width, config.projector))
    learner = _learner(config, model, processor.vocabulary)
    parameters = [p for p in learner.parameters() if p.requires_grad]
    parameters += list(projector.parameters()) if projector is not None else []
    loss = _loss(config, learner, processor, projector)

    out = Path(config.out)
    out.mkdir(parents=True, exist_ok=True)
    with (out / "log.jsonl").open("w", encoding="utf-8") as log:
        fitting = FitConfig(config.optimizer, config.steps, config.max_seconds, config.log_every)
        learner.train()
        last = fit(parameters, lambda: loss(next(batches)), fitting, lambda line: print(json.dumps(line), file=log))
    finished = learner.merge_and_unload() if config.learns == "lora" else model
    finished.eval().save_pretrained(out)
    processor.save(out)
    if projector is not None:
        write_json(out / "projector.json", to_mapping(projector.config))
        with atomic_path(out / "projector.safetensors") as temporary:
            save_file({name: value.detach().contiguous() for name, value in projector.state_dict().items()}, temporary)
    return last


def fit(
    parameters: list[nn.Parameter],
    loss: Callable[[], Tensor],
    config: FitConfig,
    report: Callable[[dict[str, float]], None] = lambda line: None,
) -> dict[str, float]:
    """Steps of AdamW on the parameters, each down the loss of a fresh batch; returns the last report."""
    options = config.optimizer
    optimizer = torch.optim.AdamW(parameters, options.lr, options.betas, weight_decay=options.weight_decay)
    started, line = time.perf_counter(), {}
    losses: list[float] = []
    for step in range(config.steps):
        seconds = time.perf_counter() - started
        if config.max_seconds and seconds >= config.max_seconds:
            break
        progress = max(step / config.steps, seconds / config.max_seconds if config.max_seconds else 0.0)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(options, step, progress)
        value = loss()
        value.backward()
        norm = float(nn.utils.clip_grad_norm_(parameters, options.clip))
        if not math.isfinite(norm):
            raise FloatingPointError(f"gradients are not finite at step {step}")
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses = [*losses, float(value.detach())][-config.log_every :]
        line = {"step": step + 1, "seconds": time.perf_counter() - started, "loss": sum(losses) / len(losses)}
        line |= {"grad_norm": norm, "lr": optimizer.param_groups[0]["lr"]}
        if (step + 1) % config.log_every == 0:
            report(line)
    return line


def build_language_model(config: LanguageModelConfig, tokenizer: Any) -> tuple[Any, MultimodalProcessor]:
    """The model with room for images, and the processor. A vocabulary that lies beside the text tokenizer is kept."""
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    require(bool(config.source) != bool(config.kind), "language_model", "either source or kind", to_mapping(config))
    named = config.text_tokenizer or config.source
    require(bool(named), "language_model.text_tokenizer", "a directory or hub id", "nothing")
    try:
        text = AutoTokenizer.from_pretrained(named)
        if config.source:
            model = AutoModelForCausalLM.from_pretrained(config.source)
        else:
            rows = {"vocab_size": len(text), **config.config}
            model = AutoModelForCausalLM.from_config(AutoConfig.for_model(config.kind, **rows))
    except (OSError, ValueError) as error:
        fail("language_model", "a causal language model and its text tokenizer", str(error).splitlines()[0])
    kept = (Path(named) / "visual_vocab.json").is_file()
    vocabulary = VisualVocabulary.load(named) if kept else VisualVocabulary.for_tokenizer(tokenizer, text)
    return extend(model, vocabulary), MultimodalProcessor(tokenizer, text, vocabulary)


def record_batches(config: BridgeConfig, processor: MultimodalProcessor) -> Iterator[Batch]:
    """Batches without end; a row's position in the run decides which record it is."""
    sources = [(Records(source.path, processor.tokenizer), source.weight) for source in config.records]
    mixture = RecordMixture(sources, config.seed)
    causal = config.objective == "next_token"

    def endless() -> Iterator[Batch]:
        position = 0
        while True:
            rows: list[Row] = processor.rows([mixture[position + index] for index in range(config.batch_size)])
            position += config.batch_size
            if config.pack:
                yield pack_rows(rows, config.pack, processor.pad, causal=causal)
            else:
                yield pad_rows(rows, processor.pad)

    return endless()


def _learner(config: BridgeConfig, model: Any, vocabulary: VisualVocabulary) -> Any:
    """The model with only those weights free that shall learn."""
    if config.learns == "lora":
        return add_lora(model, vocabulary, config.lora_rank)
    if config.learns == "new_rows":
        require(config.optimizer.weight_decay == 0, "optimizer.weight_decay", "0 for learns: new_rows", "another")
        OnlyNewRows(model, vocabulary)
    return model


def _loss(
    config: BridgeConfig, model: Any, processor: MultimodalProcessor, projector: FeatureProjector | None
) -> Callable[[Batch], Tensor]:
    """The objective as a function of a batch."""
    if config.objective == "next_token":
        if projector is None:
            return lambda batch: next_token_loss(model, batch.model_inputs())
        return lambda batch: next_token_loss(model, embed(model, batch, projector))
    mask = processor.text_tokenizer.convert_tokens_to_ids(config.mask_token) if config.mask_token else None
    if mask is None or mask == processor.text_tokenizer.unk_token_id:
        fail("mask_token", "a token of the text tokenizer", config.mask_token or "nothing")
    require(projector is None, "projector", "none for masked diffusion", config.projector)
    generator = torch.Generator().manual_seed(config.seed)
    return lambda batch: diffusion_loss(model, batch, mask, generator)
