"""`tokenizers-mm export-checkpoint`."""

import argparse

from tokenizers_mm.cli.program import PROGRAM, run_program

SUMMARY = "The networks of a training run's checkpoint, in the form of a finished run."


def add_arguments(command: argparse.ArgumentParser) -> None:
    """Add the arguments of the verb."""
    command.add_argument("run", metavar="RUN", help="folder of a run, with its checkpoints")
    command.add_argument("--step", type=int, help="step of the checkpoint (default: the newest)")
    command.add_argument("--out", required=True, metavar="DIR", help="folder for the networks, such as tokenizer/")


def run(options: argparse.Namespace) -> int:
    """Run the program of the training package."""
    step = [] if options.step is None else ["--step", str(options.step)]
    return run_program(f"{PROGRAM}.export", [options.run, "--out", options.out, *step])
