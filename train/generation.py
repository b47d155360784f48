"""`python -m tokenizers_mm.train.generation CONFIG [key=value ...]`: MAR learns to fill in images and to draw captions.

First the autoencoder, if asked, then MAR on its frozen latents: AdamW, moving average, captions dropped now and then
for guidance. Leaves log.jsonl, curves.png, checkpoints, samples and the finished tokenizer in the run's folder. Also
under `accelerate launch` or `torchrun`.
"""

import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

from tokenizers_mm._files import write_json
from tokenizers_mm.data.sources import Batch, Mixture, Positions, make_loader

from .checkpoint import resume, save_checkpoint
from .generation_config import GenerationConfig, read_generation_config
from .generation_look import draw_curves, look
from .generation_state import GenerationState, build_state, save_networks
from .generation_step import measure_scale, train_step
from .log import Log
from .loop import on_all_ranks, out_of_time


def run(config: GenerationConfig) -> dict[str, Any]:
    """Both stages, then samples; returns what summary.json holds (rank 0; the others nothing)."""
    accelerator = _accelerator(config)
    state = build_state(config, accelerator)
    if config.resume == "auto":
        resume(state)
    log, before = Log(state), state.step
    try:
        if state.stage == "autoencoder":
            batches = _batches(state)
            _train(state, batches, config.autoencoder.steps, log)
            state.begin_mar(measure_scale(state, [next(batches) for _ in range(config.accumulate)]))
        _train(state, _batches(state), config.steps, log)
    finally:
        log.close()
    if state.step > before and not (config.save_every and state.step % config.save_every == 0):
        save_checkpoint(state)
    if not accelerator.is_main_process:
        return {}
    folder = Path(config.out)
    draw_curves(folder)
    save_networks(state.averaged, folder)
    summary = {"seconds": round(state.seconds, 1), **look(config, state.averaged, folder)}
    write_json(folder / "summary.json", summary)
    return summary


def _train(state: GenerationState, batches: Iterator[Batch], last: int, log: Log) -> None:
    """The present stage, to its last step or, in MAR's, to the end of its time."""
    config, timed = state.config, state.stage == "mar" and state.config.max_seconds > 0
    started, before = time.perf_counter(), state.seconds
    while state.step < last and not (timed and out_of_time(state)):
        done = state.within / (last - state.begun)
        step_batches = [next(batches) for _ in range(config.accumulate)]
        report = train_step(state, step_batches, max(done, state.seconds / config.max_seconds if timed else 0.0))
        state.seconds = on_all_ranks(before + time.perf_counter() - started, state.accelerator.device)
        log.step(state, report, [name for batch in step_batches for name in batch.skipped])
        if config.save_every and state.step % config.save_every == 0:
            save_checkpoint(state)
            if state.stage == "mar" and state.accelerator.is_main_process:
                save_networks(state.averaged, Path(config.out))


def _accelerator(config: GenerationConfig) -> Accelerator:
    """On the device of the configuration, which is an error where there is none."""
    device = torch.device(config.device)
    precision = "no" if config.precision == "fp32" else config.precision
    accelerator = Accelerator(cpu=device.type == "cpu", mixed_precision=precision)
    if accelerator.device.type != device.type:
        raise ValueError(f"config.device: expected one that is here, such as {accelerator.device}, got {config.device}")
    return accelerator


def _batches(state: GenerationState) -> Iterator[Batch]:
    """Micro-batches of this rank from where the run stands."""
    config, accelerator = state.config, state.accelerator
    dataset = Mixture(config.data, (config.image_size, config.image_size), config.seed)
    start = state.step * config.accumulate
    rank, world = accelerator.process_index, accelerator.num_processes
    return iter(make_loader(dataset, Positions(config.batch_size, start, rank, world)))


def main(arguments: list[str]) -> int:
    """Read the configuration and train. Bad input ends with one sentence and code 2."""
    try:
        if not arguments:
            raise ValueError("config: expected the path of a YAML file, got nothing")
        summary = run(read_generation_config(arguments[0], arguments[1:]))
    except ValueError as error:
        print(f"train.generation: {error}", file=sys.stderr)
        return 2
    if summary:
        print(json.dumps(summary))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
