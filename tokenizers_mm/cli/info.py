"""`tokenizers-mm info`."""

import argparse
from pathlib import Path

from tokenizers_mm.cli.options import load_tokenizer

SUMMARY = "Say what a tokenizer is."


def add_arguments(command: argparse.ArgumentParser) -> None:
    """Add the arguments of the verb."""
    command.add_argument("tokenizer", help="directory or hub id")


def run(options: argparse.Namespace) -> None:
    """Print the facts that config.json states; where it does not, those of the loaded model."""
    from tokenizers_mm._summary import describe, read_lines

    path = Path(options.tokenizer)
    shipped = Path(__file__).resolve().parents[1] / "pretrained" / path.name
    lines = read_lines(shipped if options.tokenizer == f"tokenizers_mm/{path.name}" and not path.is_dir() else path)
    if lines is None:
        tokenizer = load_tokenizer(options)
        from tokenizers_mm.config import to_mapping  # with torch, as all that follows
        from tokenizers_mm.models.saving import summarize

        lines = describe(tokenizer.family, summarize(tokenizer), to_mapping(tokenizer.provenance))
    print("\n".join(lines))
