"""`tokenizers-mm demo`."""

import argparse
from pathlib import Path

from tokenizers_mm.cli.program import PROGRAM, run_program

SUMMARY = "Train a small tokenizer on real photographs and look at it (minutes, CPU)."


def add_arguments(command: argparse.ArgumentParser) -> None:
    """Add the arguments of the verb."""
    command.add_argument("--out", type=Path, default=Path("runs/demo"), help="folder (default: %(default)s)")
    command.add_argument("--quick", action="store_true", help="a first look in a minute")


def run(options: argparse.Namespace) -> int:
    """Run the demo of the training program."""
    return run_program(f"{PROGRAM}.demo", ["--out", str(options.out), *(["--quick"] if options.quick else [])])
