"""The loop knows only when: when to take a step, to log, to draw samples, to save, to end."""

import time
from collections.abc import Iterator
from pathlib import Path

import torch
from accelerate import Accelerator

from tokenizers_mm.data.buckets import AnySize, BucketBatches
from tokenizers_mm.data.sources import Batch, Mixture, Positions, list_images, make_loader

from .checkpoint import Run, resume, save_checkpoint
from .config import TrainConfig
from .log import Log
from .ranks import share_from_first
from .state import TrainState, build_state
from .step import train_step


def run(config: TrainConfig) -> TrainState:
    """Train to the end; leaves log.jsonl, samples, checkpoints and the finished `tokenizer` in the run's folder."""
    accelerator = Accelerator(mixed_precision="no" if config.precision == "fp32" else config.precision)
    state = build_state(config, accelerator)
    if config.resume == "auto":
        resume(state)
    log = Log(state)
    samples = None
    try:
        batches = sample_batches(state)
        started, before = time.perf_counter(), state.seconds
        while state.step < config.steps and not out_of_time(state):
            step_batches = [next(batches) for _ in range(config.accumulate)]
            samples = step_batches[0].images[:8] if samples is None else samples
            report = train_step(state, step_batches, progress(state))
            state.seconds = on_all_ranks(before + time.perf_counter() - started, accelerator.device)
            skipped = [name for batch in step_batches for name in batch.skipped]
            log.step(state, report, skipped, state.take_usage)
            if config.sample_every and state.step % config.sample_every == 0:
                log.samples(state, samples.to(accelerator.device))
            if config.save_every and state.step % config.save_every == 0:
                save_checkpoint(state)
        if samples is not None and config.sample_every:
            log.samples(state, samples.to(accelerator.device))
    finally:
        log.close()
    if samples is not None and not (config.save_every and state.step % config.save_every == 0):
        save_checkpoint(state)
    if accelerator.is_main_process:
        state.averaged.save(Path(config.out) / "tokenizer")
    accelerator.wait_for_everyone()
    return state


def sample_batches(state: TrainState) -> Iterator[Batch]:
    """Micro-batches from where the run stands."""
    config, data, accelerator = state.config, state.config.data, state.accelerator
    start = state.step * config.accumulate
    rank, world = accelerator.process_index, accelerator.num_processes
    size = state.tokenizer.image_size or data.image_size
    if data.buckets is None:
        if size is None:
            raise ValueError("config.data: expected image_size or buckets for a tokenizer of any size, got neither")
        state.tokenizer.check_size(*size)
        dataset, positions = Mixture(data, size, config.seed), Positions(config.batch_size, start, rank, world)
    else:
        if size is not None:
            raise ValueError(f"config.data.buckets: expected a tokenizer of any size and no image_size, got {size}")
        if any(source.kind != "folder" for source in data.sources):
            raise ValueError("config.data.buckets: expected folders as sources, got another kind")
        files = [file for source in data.sources for file in list_images(source.path)]
        dataset = AnySize(files, data.buckets, data.workers)
        positions = BucketBatches(dataset.sizes, config.batch_size, config.seed, start, rank, world)
    return iter(make_loader(dataset, positions))


def progress(state: Run) -> float:
    """Share of the run that is done, by steps or by time, whichever is further."""
    by_steps = state.step / state.config.steps
    return max(by_steps, state.seconds / state.config.max_seconds) if state.config.max_seconds else by_steps


def out_of_time(state: Run) -> bool:
    """Whether the time of the run is up; all ranks hold the same time."""
    return bool(state.config.max_seconds) and state.seconds >= state.config.max_seconds


def on_all_ranks(seconds: float, device: torch.device) -> float:
    """The time of rank 0, so that all ranks take the same learning rate and end together."""
    return float(share_from_first(torch.tensor([seconds], dtype=torch.float64, device=device)))
