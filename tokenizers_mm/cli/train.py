"""`tokenizers-mm train`: the training program reads its own arguments, with the parser that is made here."""

import argparse

from tokenizers_mm.cli.program import PROGRAM, run_program

SUMMARY = "Train from a configuration, or from a preset on a folder of images."

OWN_ARGUMENTS = True
"""All arguments go to `run` as they are."""

PRESETS = ("small", "base", "tokenflow", "dualvitok", "mar")


def add_arguments(command: argparse.ArgumentParser) -> None:
    """Add the arguments of the training program; its own `--help` adds the keys of a configuration."""
    command.add_argument("words", nargs="*", metavar="CONFIG | key=value",
                         help="a YAML file, the name of a shipped one (see `tokenizers-mm configs`), or - for stdin; "
                         "and values in place of those of the file")  # fmt: skip
    command.add_argument("--check", action="store_true",
                         help="validate, print the whole configuration and the sizes, and touch nothing")  # fmt: skip
    command.add_argument("--overwrite", action="store_true", help="replace the run that is in the folder `out`")
    command.add_argument("--preset", choices=PRESETS, help="make the configuration (in place of CONFIG)")
    command.add_argument("--images", metavar="FOLDER", help="with --preset: the images to train on, at any depth")
    command.add_argument("--size", type=int, help="with --preset: side of the images in pixels")
    command.add_argument("--codebook", type=int, help="with --preset: number of codes")
    command.add_argument("--out", metavar="DIR", help="folder of the run (also as out=DIR)")


def run(options: argparse.Namespace) -> int:
    """Run the training program with `options.arguments`."""
    return run_program(PROGRAM, options.arguments)
