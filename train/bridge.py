"""Training of a language model on rows of text and images: the loop, the builders of its model and its batches."""

import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

from tokenizers_mm import load
from tokenizers_mm._check import require
from tokenizers_mm._images import Fit
from tokenizers_mm.config import to_mapping
from tokenizers_mm.llm import Batch, MultimodalProcessor, VisualVocabulary, extend
from tokenizers_mm.llm.batch import Row, pad_rows
from tokenizers_mm.llm.packing import pack_rows
from tokenizers_mm.llm.records import RecordMixture, Records
from tokenizers_mm.llm.transformers_api import load_language_model, load_text_tokenizer, new_language_model

from .bridge_config import MAY_CHANGE, BridgeConfig, LanguageModelConfig
from .bridge_config import RecordConfig as RecordConfig
from .bridge_config import read_bridge_config as read_bridge_config
from .bridge_state import BridgeState, bridge_step, build_bridge_state, save_finished
from .checkpoint import resume, save_checkpoint
from .log import Log
from .loop import on_all_ranks, out_of_time, progress


def run_bridge(config: BridgeConfig) -> BridgeState:
    """Train to the end; leaves log.jsonl, checkpoints, and the finished model with its text tokenizer in the folder."""
    accelerator = Accelerator(mixed_precision="no" if config.precision == "fp32" else config.precision)
    torch.manual_seed(config.seed)
    tokenizer: Any = load(config.tokenizer).to(accelerator.device)
    features = getattr(tokenizer, "stream_features", None) if config.features == "streams" else None
    require(
        config.features == "tokenizer" or features is not None, "features", "tokenizer (no streams here)", "streams"
    )
    model, processor = build_language_model(config.language_model, tokenizer, config.fit, features)
    state = build_bridge_state(config, accelerator, model, processor)
    if config.resume == "auto":
        resume(state, MAY_CHANGE)
    batches = record_batches(config, processor, state.rows, accelerator.process_index, accelerator.num_processes)
    log, saved = Log(state), state.step
    try:
        started, before = time.perf_counter(), state.seconds
        while state.step < config.steps and not out_of_time(state):
            report = bridge_step(state, [next(batches) for _ in range(config.accumulate)], progress(state))
            state.seconds = on_all_ranks(before + time.perf_counter() - started, accelerator.device)
            log.step(state, report)
            if config.save_every and state.step % config.save_every == 0:
                save_checkpoint(state)
                saved = state.step
    finally:
        log.close()
    if config.save_every and saved != state.step:
        save_checkpoint(state)
    if accelerator.is_main_process:
        save_finished(state)
    accelerator.wait_for_everyone()
    return state


def build_language_model(
    config: LanguageModelConfig,
    tokenizer: Any,
    fit_pictures: Fit = "refuse",
    features: Callable[[Any], Any] | None = None,
) -> tuple[Any, MultimodalProcessor]:
    """The model with room for images, and the processor (with its `fit` and `features`).

    A vocabulary that lies beside the text tokenizer is kept.
    """
    require(bool(config.source) != bool(config.kind), "language_model", "either source or kind", to_mapping(config))
    named = config.text_tokenizer or config.source
    require(bool(named), "language_model.text_tokenizer", "a directory or hub id", "nothing")
    text = load_text_tokenizer(named, "language_model.text_tokenizer")
    if config.source:
        model = load_language_model(config.source, "language_model", dtype=torch.float32)
    else:
        rows = {"vocab_size": len(text), **config.config}
        model = new_language_model(config.kind, "language_model", rows)
    kept = (Path(named) / "visual_vocab.json").is_file()
    if kept:
        vocabulary = VisualVocabulary.load(named)
    else:
        vocabulary = VisualVocabulary.for_tokenizer(tokenizer, text, sizes=config.sizes or None)
    processor = MultimodalProcessor(tokenizer, text, vocabulary, fit_pictures, features=features)
    return extend(model, vocabulary), processor


def record_batches(
    config: BridgeConfig, processor: MultimodalProcessor, start: int = 0, rank: int = 0, world: int = 1
) -> Iterator[Batch]:
    """Micro-batches of one of `world` ranks without end, from row `start` of the mixture on.

    A row's position in the run decides which record it is. The ranks take turns, a micro-batch each: the rows of a step
    are the same however they are shared out.
    """
    sources = [(Records(source.path, processor.tokenizer, source.outside), source.weight) for source in config.records]
    mixture = RecordMixture(sources, config.seed)
    causal = config.objective == "next_token"

    def endless() -> Iterator[Batch]:
        position = start + rank * config.batch_size
        while True:
            rows: list[Row] = processor.rows([mixture[position + index] for index in range(config.batch_size)])
            position += config.batch_size * world
            if config.pack:
                yield pack_rows(rows, config.pack, processor.pad, causal=causal)
            else:
                yield pad_rows(rows, processor.pad)

    return endless()
