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
from torch import Tensor

from tokenizers_mm._files import write_json
from tokenizers_mm.data.sources import Batch, Mixture, Positions, make_loader
from tokenizers_mm.eval.pictures import plot_curves

from .generation_config import GenerationConfig, read_generation_config
from .generation_look import look
from .generation_state import GenerationState, begin_mar, build_state, resume, save_checkpoint, save_networks
from .generation_step import measure_scale, train_step
from .log import forget_lines, read_log
from .ranks import number_of_first


def run(config: GenerationConfig) -> dict[str, Any]:
    """Both stages, then samples; returns what summary.json holds (rank 0; the others nothing)."""
    accelerator = _accelerator(config)
    state = build_state(config, accelerator)
    if config.resume == "auto":
        resume(state)
    log = _Log(state)
    if state.stage == "autoencoder":
        batches = _batches(state)
        _train(state, batches, config.autoencoder.steps, 0.0, log)
        begin_mar(state, measure_scale(state, [next(batches) for _ in range(config.accumulate)]))
    before = state.total
    _train(state, _batches(state), config.steps, config.max_seconds, log)
    if state.total > before and not (config.save_every and state.total % config.save_every == 0):
        save_checkpoint(state)
    if not accelerator.is_main_process:
        return {}
    folder = Path(config.out)
    log.curves()
    save_networks(state.averaged, folder)
    summary = {"seconds": round(state.seconds, 1), **look(config, state.averaged, folder)}
    write_json(folder / "summary.json", summary)
    return summary


def _train(state: GenerationState, batches: Iterator[Batch], steps: int, max_seconds: float, log: "_Log") -> None:
    """The present stage, to its end by steps or by time."""
    config = state.config
    started, before = time.perf_counter(), state.seconds
    while state.step < steps and not (max_seconds and state.seconds >= max_seconds):
        progress = max(state.step / steps, state.seconds / max_seconds if max_seconds else 0.0)
        step_batches = [next(batches) for _ in range(config.accumulate)]
        report = train_step(state, step_batches, progress)
        state.seconds = number_of_first(before + time.perf_counter() - started, state.accelerator.device)
        log.add(state, report, [name for batch in step_batches for name in batch.skipped])
        if config.save_every and state.total % config.save_every == 0:
            save_checkpoint(state)


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
    start = state.total * config.accumulate
    rank, world = accelerator.process_index, accelerator.num_processes
    return iter(make_loader(dataset, Positions(config.batch_size, start, rank, world)))


class _Log:
    """Means over the ranks of the reported values every few steps, as JSON lines and as a picture."""

    def __init__(self, state: GenerationState) -> None:
        self.path, self._sums, self._count = Path(state.config.out) / "log.jsonl", {}, 0
        if not state.accelerator.is_main_process:
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        done = {"autoencoder": state.autoencoder_steps, "mar": state.mar_steps}
        forget_lines(self.path, lambda line: line["step"] <= done[line["stage"]])

    def add(self, state: GenerationState, values: dict[str, Tensor], skipped: list[str]) -> None:
        """Take the values of a step; a new stage forgets what the last one has not written. Called on every rank."""
        for name in skipped:
            print(f"skipped: {name}", file=sys.stderr)
        if self._sums.keys() != values.keys():
            self._sums, self._count = {}, 0
        for name, value in values.items():
            self._sums[name] = self._sums.get(name, 0.0) + value
        self._count += 1
        if state.step % state.config.log_every:
            return
        mean: Any = state.accelerator.reduce(torch.stack(list(self._sums.values())) / self._count, "mean")
        means = dict(zip(self._sums, mean.tolist(), strict=True))
        self._sums, self._count = {}, 0
        if not state.accelerator.is_main_process:
            return
        line = {"stage": state.stage, "step": state.step, "seconds": round(state.seconds, 3), **means}
        with open(self.path, "a", encoding="utf-8") as stream:
            stream.write(json.dumps(line) + "\n")
        shown = ", ".join(f"{name} {value:.4g}" for name, value in means.items())
        print(f"{state.step}: {shown}", file=sys.stderr)

    def curves(self) -> None:
        """Draw the curves of the whole run, if there are any."""
        curves: dict[str, list[tuple[float, float]]] = {}
        for line in read_log(self.path) if self.path.exists() else []:
            for name in line.keys() - {"stage", "step", "seconds"}:
                curves.setdefault(name, []).append((line["step"], line[name]))
        if curves:
            plot_curves(dict(sorted(curves.items())), self.path.parent / "curves.png")


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
