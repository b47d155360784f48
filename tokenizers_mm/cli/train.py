"""`tokenizers-mm train`: the training program reads its own arguments."""

import argparse

from tokenizers_mm.cli.program import PROGRAM, run_program

SUMMARY = "Train: CONFIG [key=value ...]."

OWN_ARGUMENTS = True
"""All arguments go to `run` as they are."""


def add_arguments(command: argparse.ArgumentParser) -> None:
    """Add nothing."""


def run(options: argparse.Namespace) -> int:
    """Run the training program with `options.arguments`."""
    return run_program(PROGRAM, options.arguments)
