"""What a run leaves to read and to look at: a JSON line per report, a progress bar, sample grids, TensorBoard."""

import importlib.util
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from tokenizers_mm._files import atomic_path
from tokenizers_mm.eval.pictures import comparison_grid, save_picture

from .checkpoint import Run
from .state import TrainState


class Log:
    """Of rank 0; the other ranks hold a silent one. `start` is the first step of this process."""

    def __init__(self, state: Run) -> None:
        self.active = state.accelerator.is_main_process
        self.folder = Path(state.config.out)
        self.path = self.folder / "log.jsonl"
        self._sums: dict[str, float] = {}
        self._counted: dict[str, int] = {}
        self._tensorboard: Any = None
        self._bar: Any = None
        if not self.active:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        _forget_after(self.path, state.step)
        self._bar = tqdm(total=state.config.steps, initial=state.step, unit="step", file=sys.stderr, mininterval=0.5)
        if importlib.util.find_spec("tensorboard") is not None:
            from torch.utils.tensorboard import SummaryWriter  # only where it is installed

            self._tensorboard = SummaryWriter(str(self.folder / "tensorboard"), purge_step=state.step)

    def step(
        self,
        state: Run,
        report: dict[str, float],
        skipped: Sequence[str] = (),
        usage: Callable[[], dict[str, float]] = dict,
    ) -> None:
        """Take the report of a step; every `log_every` steps write the means, of each value over the steps that gave
        one, and the usage of codes."""
        if not self.active:
            return
        for name in skipped:
            self._bar.write(f"skipped: {name}", file=sys.stderr)
        if skipped:
            report = report | {"skipped": float(len(skipped))}
        for name, value in report.items():
            self._sums[name] = self._sums.get(name, 0.0) + value
            self._counted[name] = self._counted.get(name, 0) + 1
        self._bar.update(1)
        if state.step % state.config.log_every == 0 or state.step == state.config.steps:
            self._write(state, usage())

    def _write(self, state: Run, usage: dict[str, float]) -> None:
        totals = ("revived", "skipped")
        line: dict[str, float] = {"step": state.step, "seconds": round(state.seconds, 3)}
        line |= {n: v if n in totals else v / self._counted[n] for n, v in self._sums.items()}
        line |= usage
        self._sums, self._counted = {}, {}
        self._append(line)
        shown = {n: f"{line[n]:.4g}" for n in ("loss", "psnr", "semantic") if n in line}
        shown |= {n: f"{v:.0%}" for n, v in line.items() if n.startswith("usage_")}
        self._bar.set_postfix(shown)
        if self._tensorboard is not None:
            for name, value in line.items():
                self._tensorboard.add_scalar(name, value, state.step)

    def note(self, state: Run, line: dict[str, Any], message: str = "") -> None:
        """A line of its own, now; the message goes to the screen."""
        if self.active:
            self._append({"step": state.step} | line)
            if message:
                self._bar.write(message, file=sys.stderr)

    def _append(self, line: dict[str, Any]) -> None:
        with open(self.path, "a", encoding="utf-8") as stream:
            stream.write(json.dumps(line) + "\n")

    def samples(self, state: TrainState, images: torch.Tensor) -> None:
        """Originals over reconstructions of a few images, as a PNG."""
        if not self.active:
            return
        tokenizer = state.averaged
        was_training = tokenizer.training
        tokenizer.eval()
        with torch.no_grad():
            decoded = tokenizer.decode(tokenizer.encode(images)).float().clamp(-1, 1).cpu()
        tokenizer.train(was_training)
        save_picture(comparison_grid(images.cpu(), decoded), self.folder / "samples" / f"step_{state.step:09d}.png")

    def close(self) -> None:
        """Flush and close."""
        if self._bar is not None:
            self._bar.close()
        if self._tensorboard is not None:
            self._tensorboard.close()


def read_log(path: str | Path) -> list[dict[str, float]]:
    """The lines of a log."""
    with open(path, encoding="utf-8") as stream:
        return [json.loads(line) for line in stream]


def _forget_after(path: Path, step: int) -> None:
    """Drop lines past the step a run goes on from, and a line that was cut off."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            if json.loads(line)["step"] <= step:
                kept.append(line)
        except (json.JSONDecodeError, KeyError):
            continue
    with atomic_path(path) as temporary:
        temporary.write_text("".join(line + "\n" for line in kept), encoding="utf-8")
