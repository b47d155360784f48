"""The demo: train a small two-codebook tokenizer, measure it on held-out images, save it, load it, show it.

Then a small language model learns to read and to write its codes. The work is a fixed number of steps: every machine
gets the same quality, and one machine the same numbers every time.
"""

import argparse
import sys
import tempfile
import time
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from tokenizers_mm._files import write_json
from tokenizers_mm.cli.demo import add_arguments

from ..config import RunConfig, read_config
from ..state import build_state
from ..step import train_step
from .clock import Clock, in_words
from .tokenizer import measure_tokenizer, train_tokenizer

CONFIGS = Path(__file__).resolve().parents[2] / "configs"

TOKENIZER, PROBES = "train the tokenizer", "measure it"
LANGUAGE_MODEL, DRAWINGS = "train the language model", "ask it and let it draw"


@dataclass(frozen=True)
class Work:
    """Steps of the tokenizer and of the language model, and scenes that the latter learns from."""

    tokenizer_steps: int
    language_steps: int
    language_scenes: int


FULL, QUICK = Work(1200, 6000, 8000), Work(150, 500, 2000)

WARM_START, PROBING, LESSON, DRAWING = 25, 70, 0.015, 200
"""Work besides the steps, in units of them: before the tokenizer's training and after it, in its steps; for each scene
before the language model's training and after it, in its steps."""


def demo(out: Path, quick: bool = False) -> dict[str, Any]:
    """Run all of it; leaves the tokenizer, the language model, images and summary.json in `out`; returns the summary.

    quick: an eighth of the steps, for a first look. Without `transformers` it ends with the tokenizer.
    """
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore (no value that is read depends on it)
    work, speaks = QUICK if quick else FULL, find_spec("transformers") is not None
    steps = [f"out={out / 'training'}", f"steps={work.tokenizer_steps}"]
    config = read_config(str(CONFIGS / "demo.yaml"), steps)
    started = time.perf_counter()
    clock = Clock(predict(config, work, speaks))
    print(f"On this machine this takes about {in_words(sum(clock.expected.values()))}.", file=sys.stderr)
    clock.begin(TOKENIZER)
    tokenizer, trained = train_tokenizer(config, out)
    clock.begin(PROBES)
    summary = measure_tokenizer(tokenizer, out) | trained
    write_json(out / "summary.json", summary)
    if not speaks:
        print("The language model needs transformers: pip install 'tokenizers_mm[llm]'", file=sys.stderr)
        return summary
    from .judgement import measure_language_model  # an optional package
    from .language_model import teach

    clock.begin(LANGUAGE_MODEL)
    count = work.language_steps
    bridge, taught = teach(tokenizer, out, count, work.language_scenes, lambda step: clock.tick(step / count))
    clock.begin(DRAWINGS)
    summary |= measure_language_model(bridge, tokenizer, out) | taught
    summary["whole_seconds"] = time.perf_counter() - started
    write_json(out / "summary.json", summary)
    return summary


def predict(config: RunConfig, work: Work, speaks: bool) -> dict[str, float]:
    """Seconds of every phase, from a few steps of each kind on this machine."""
    with tempfile.TemporaryDirectory() as folder:
        state = build_state(replace(config, out=folder, objective=replace(config.objective, warm_start=None)))
        batches = state.objective.batches(0, 0)
        step = _seconds(lambda: train_step(state, [next(batches)]), 6)
        expected = {TOKENIZER: (work.tokenizer_steps + WARM_START) * step, PROBES: PROBING * step}
        if speaks:
            from .language_model import TURNS, teach  # an optional package

            times = [time.perf_counter()]
            count = 3 * len(TURNS)
            teach(state.averaged.eval(), Path(folder), count, 64, lambda _: times.append(time.perf_counter()))
            turn = (times[-1] - times[len(TURNS)]) / (2 * len(TURNS))
            expected |= {
                LANGUAGE_MODEL: (work.language_steps + LESSON * work.language_scenes) * turn,
                DRAWINGS: DRAWING * turn,
            }
    return expected


def _seconds(act: Any, count: int) -> float:
    """Mean seconds of a call, after two that are not counted."""
    for _ in range(2):
        act()
    started = time.perf_counter()
    for _ in range(count):
        act()
    return (time.perf_counter() - started) / count


def main(arguments: list[str]) -> int:
    """Run, then print one table and where to look."""
    parser = argparse.ArgumentParser(prog="tokenizers-mm demo")
    add_arguments(parser)
    options = parser.parse_args(arguments)
    summary = demo(options.out, options.quick)
    print()
    for name, value in summary.items():
        print(f"{name:<26} {value:.4g}" if isinstance(value, float) else f"{name:<26} {value}")
    print(f"\nLook at {options.out / 'reconstructions.png'}: originals over reconstructions, never trained on,")
    print(f"and at {options.out / 'curves.png'}: the training.")
    print(f"The tokenizer is in {options.out / 'tokenizer'}: tokenizers_mm.load takes it.")
    if "generation_accuracy" in summary:
        print(f"What the language model sees: {options.out / 'understanding.md'}; what it draws from captions it never")
        print(f"read: {options.out / 'generation.png'}. It is in {options.out / 'language_model'}.")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
