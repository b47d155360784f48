"""`tokenizers-mm export`."""

import argparse
from pathlib import Path

from tokenizers_mm.cli.options import load_tokenizer, tokenizer_option

SUMMARY = "Encode and decode as graphs, compared with the model."


def add_arguments(command: argparse.ArgumentParser) -> None:
    """Add the arguments of the verb."""
    tokenizer_option(command)
    command.add_argument("--format", choices=("torch", "onnx"), required=True)
    command.add_argument("--size", type=int, nargs=2, metavar=("HEIGHT", "WIDTH"), help="where any size is taken")
    command.add_argument("--batch-size", type=int, default=1)
    command.add_argument("--out", type=Path, required=True)


def run(options: argparse.Namespace) -> None:
    """Export a tokenizer and print the greatest differences."""
    from tokenizers_mm.export.graph import export

    size = tuple(options.size) if options.size else None
    print(export(load_tokenizer(options), options.format, options.out, size, options.batch_size))
