"""The only training loop. It knows when: to step, log, show, validate, save, change the stage, end.

What a step is stands in `step.py`, what a run is made of in `state.py`, what is learned in `objectives`.
"""

import contextlib
import time
from pathlib import Path
from typing import Any

from tokenizers_mm._files import one_writer

from .checkpoint import Checkpoints, resume
from .config import RunConfig
from .distributed import agree
from .log import Log
from .signals import Signals
from .state import State, build_state
from .step import train_step


class InterruptedRunError(Exception):
    """A signal ended the run after a checkpoint; `number` is the signal's."""

    def __init__(self, number: int, step: int) -> None:
        super().__init__(f"stopped by signal {number} after step {step}; the same command continues")
        self.number = number


def run(config: RunConfig) -> State:
    """Train to the end, from the newest checkpoint where there is one.

    Leaves log.jsonl, samples, checkpoints and the finished networks in the run's folder.
    Raises: InterruptedRunError after SIGINT or SIGTERM, with a checkpoint of the last step.
    """
    state = build_state(config)
    with contextlib.ExitStack() as stack:
        if state.accelerator.is_main_process:
            stack.enter_context(one_writer(config.out, "config.out"))
        resumed = config.resume == "auto" and resume(state)
        signals = stack.enter_context(Signals())
        log = stack.enter_context(contextlib.closing(Log(state, resumed)))
        checkpoints = stack.enter_context(contextlib.closing(Checkpoints()))
        if not resumed:
            log.notes(state, state.objective.begin(state.whole(), 0, 0))
        _train(state, log, signals, checkpoints)
    networks = state.whole()
    if state.accelerator.is_main_process:
        state.objective.save(networks, Path(config.out))
    state.accelerator.wait_for_everyone()
    return state


def _train(state: State, log: Log, signals: Signals, checkpoints: Checkpoints) -> None:
    """Step after step to the end of the run, or to a signal, with a checkpoint at the end of what was done."""
    config, objective = state.config, state.objective
    saved_step, signal = state.step, 0
    batches: Any = None
    while not state.finished and not signal:
        if batches is None:  # at the start of the program and of every stage
            batches = objective.batches(state.stage, state.samples)
        started = time.perf_counter()
        micro_batches = [next(batches) for _ in range(config.accumulate)]
        waited = time.perf_counter() - started
        report, notes = train_step(state, micro_batches)
        spent, signal = agree(time.perf_counter() - started, signals.received, state.accelerator.device)
        state.seconds, state.stage_seconds = state.seconds + spent, state.stage_seconds + spent
        log.step(state, report | {"data_wait": waited / spent}, micro_batches)
        log.notes(state, notes)
        if config.sample_every and (state.step % config.sample_every == 0 or state.finished):
            log.show(state, state.whole())
        if config.validate_every and (state.step % config.validate_every == 0 or state.finished):
            log.notes(state, [_validate(state)])
        if state.stage_over and not state.finished:
            state.enter(state.stage + 1)
            log.notes(state, objective.begin(state.whole(), state.stage, state.samples))
            batches = None
        if config.save_every and state.step % config.save_every == 0:
            checkpoints.save(state)
            saved_step = state.step
    if saved_step != state.step and (config.save_every or signal):
        checkpoints.save(state)
    checkpoints.finish()
    if signal and not state.finished:
        raise InterruptedRunError(signal, state.step)


def _validate(state: State) -> dict[str, float]:
    """Measure held-out samples; the best networks so far go to `out/best`. Returns a line for the log."""
    networks = state.whole()
    found = state.objective.validate(networks)
    value, better = found.get(state.config.best), state.objective.MEASURES.get(state.config.best, 1)
    if value is not None and (state.best is None or better * value > better * state.best):
        state.best = value
        if state.accelerator.is_main_process:
            state.objective.save(networks, Path(state.config.out) / "best")
    return {f"validation_{name}": value for name, value in found.items()}
