"""Traces of a run: a JSON line per report, a progress bar, sample images."""

import json
import math
import re
import sys
import time
from collections import Counter, deque
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from tokenizers_mm._files import atomic_path, file_place
from tokenizers_mm.cli.progress import duration

from .distributed import count_over_ranks
from .signs import Signs
from .state import State
from .trackers import Trackers

TOTALS = ("revived", "skipped_steps")
"""Names of values that are added up between two lines of the log; of all others the mean counts."""

SHOWN_SKIPS = 20
"""Inputs left out that are named on the screen; those after them are only counted, by cause."""


BAR = "{l_bar}{bar}| {n_fmt}/{total_fmt} [{elapsed}, {rate_fmt}{postfix}]"
"""The bar without its own estimate of the time left, which knows neither checkpoints nor a limit of time."""


class Pace:
    """Time left, from the wall-clock time of the last steps, everything between them included."""

    def __init__(self, clock: Callable[[], float] = time.monotonic, window: int = 1000) -> None:
        """window: number of steps that count."""
        self._clock = clock
        self._seen: deque[tuple[int, float]] = deque(maxlen=window)

    def note(self, step: int) -> None:
        """A step has ended."""
        self._seen.append((step, self._clock()))

    def left(self, steps: int, limit: float | None = None) -> float | None:
        """Seconds from the last step to step `steps`; None before two were seen. limit: for a run by time, its rest."""
        (first, begun), (last, now) = self._seen[0], self._seen[-1]
        if last == first:
            return limit
        left = (steps - last) * (now - begun) / (last - first)
        return left if limit is None else max(0.0, min(left, limit))


class Log:
    """Writer of rank 0; on other ranks it writes nothing."""

    def __init__(self, state: State, resumed: bool) -> None:
        """resumed: keep the lines of the log up to the present step; otherwise none."""
        self.active = state.accelerator.is_main_process
        self.folder = Path(state.config.out)
        self.path = self.folder / "log.jsonl"
        self._bar: Any = None
        self._shown_skips = 0
        if not self.active:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        _forget_after(self.path, state.step if resumed else -1)
        self._bar = tqdm(
            total=state.steps, initial=state.step, unit="step", file=sys.stderr, mininterval=0.5, bar_format=BAR
        )
        if resumed:
            self._bar.write(f"resumed from step {state.step}", file=sys.stderr)
        self._pace = Pace()
        self._signs = Signs(read_log(self.path) if self.path.exists() else [])
        self._trackers = Trackers(state, resumed)

    def step(self, state: State, report: dict[str, float], batches: Sequence[Any]) -> None:
        """Take the report of a step; every `log_every` steps, and at the end of a stage, write the means."""
        due = state.step % state.config.log_every == 0 or state.stage_over or state.finished
        line = state.objective.window() if due else {}
        for sentence in (sentence for batch in batches for sentence in state.objective.skipped(batch)):
            state.skipped.update(["skipped", f"skipped_{_cause(sentence)}"])
            self._shown_skips += 1
            if self.active and self._shown_skips <= SHOWN_SKIPS:
                self._bar.write(f"skipped: {sentence}", file=sys.stderr)
        for name, value in report.items():
            total, count = state.reported.get(name, (0.0, 0))
            state.reported[name] = (total + value, count + 1)
        if due:
            means = {n: total if n in TOTALS else total / count for n, (total, count) in state.reported.items()}
            line = means | line | count_over_ranks(state.skipped)
            state.reported, state.skipped = {}, Counter()
        if not self.active:
            return
        self._bar.update(1)
        self._pace.note(state.step)
        if due:
            self._write(state, line)

    def _write(self, state: State, values: dict[str, float]) -> None:
        line: dict[str, float] = {"step": state.step, "seconds": round(state.seconds, 3)}
        if len(state.objective.stages) > 1:
            line["stage"] = state.stage
        line |= values
        self._append(line)
        limit = state.config.max_seconds - state.stage_seconds if state.timed else None
        left = self._pace.left(state.steps, limit)
        shown = {} if left is None else {"left": duration(left)}
        shown |= {n: f"{line[n]:.4g}" for n in ("loss", "psnr", "semantic", "data_wait") if n in line}
        shown |= {n: f"{v:.0%}" for n, v in line.items() if n.startswith("usage_")}
        self._bar.set_postfix(shown)
        signs = self._signs.look(line)
        self.notes(state, [{"sign": sentence, "message": f"sign of trouble: {sentence}"} for sentence in signs])

    def notes(self, state: State, lines: Sequence[dict[str, Any]]) -> None:
        """Lines of their own, now; the entry "message" of a line goes to the screen instead."""
        for line in lines if self.active else []:
            message = line.pop("message", "")
            self._append({"step": state.step} | line)
            if message:
                self._bar.write(message, file=sys.stderr)

    def _append(self, line: dict[str, Any]) -> None:
        """One line of strict JSON, in which a value that is not finite is null; its numbers go to the trackers too."""
        self._trackers.log(line["step"], line)
        with open(self.path, "a", encoding="utf-8") as stream:
            finite = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in line.items()}
            stream.write(json.dumps(finite, allow_nan=False) + "\n")

    def show(self, state: State, networks: Mapping[str, Any]) -> None:
        """Sample images of the present step by these networks."""
        path = self.folder / "samples" / f"step_{state.step:09d}.png"
        if self.active:
            state.objective.show(networks, path)
            self._trackers.image(state.step, path)

    def close(self) -> None:
        """Flush and close."""
        if self.active:
            self._bar.close()
            self._trackers.close()


def _cause(sentence: str) -> str:
    """Cause in a sentence about an input that was left out: the class of an error, what there is, or what there is not.

    Numbers, such as sizes, and names of files are no part of it: a log has as many names as there are causes.
    """
    expected, _, got = sentence.rpartition(", got ")
    found = re.match(r"[a-zA-Z ]+(?=: |$)", got)
    return re.sub(r"\W+", "_", found[0] if found else "not " + expected.rpartition("expected ")[2])


def read_log(path: str | Path) -> list[dict[str, float]]:
    """Lines of a log; None stands for a value that was not finite."""
    with open(path, encoding="utf-8") as stream:
        return [json.loads(line) for line in stream]


def _step_of(line: str) -> float:
    """The step of a line of a log; infinity for what is no such line."""
    try:
        found = json.loads(line)
    except (ValueError, RecursionError):
        return math.inf
    step = found.get("step") if isinstance(found, dict) else None
    return step if type(step) is int else math.inf


def _forget_after(path: Path, step: int) -> None:
    """Drop lines past the step from which a run continues, and a line that was cut off."""
    if not file_place(path).exists():
        return
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    kept = [line for line in lines if _step_of(line) <= step]
    with atomic_path(path) as temporary:
        temporary.write_text("".join(line + "\n" for line in kept), encoding="utf-8")
