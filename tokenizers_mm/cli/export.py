"""`tokenizers-mm export`."""

import argparse
from pathlib import Path

from tokenizers_mm.cli.options import load_tokenizer, tokenizer_option

SUMMARY = "Encode and decode as graphs, compared with the model."


def add_arguments(command: argparse.ArgumentParser) -> None:
    """Add the arguments of the verb."""
    tokenizer_option(command)
    command.add_argument("--format", choices=("torch", "onnx"), required=True, help="of the graphs")
    command.add_argument("--size", type=int, nargs=2, metavar=("HEIGHT", "WIDTH"), help="where any size is taken")
    command.add_argument("--batch-size", type=int, default=1, help="images that go in at once (default: %(default)s)")
    command.add_argument("--out", type=Path, required=True, help="folder of the two graphs and graphs.json")


def run(options: argparse.Namespace) -> None:
    """Export a tokenizer and print the files."""
    from tokenizers_mm.export.graph import export

    size = tuple(options.size) if options.size else None
    folder = export(load_tokenizer(options), options.format, options.out, size, options.batch_size)
    print(f"{folder}: {', '.join(sorted(path.name for path in folder.iterdir()))}")
