"""Options that several verbs have."""

import argparse
from typing import Any

SHIPPED = "tokenizers_mm/demo-64"
"""Tokenizer of `encode`, `decode`, `eval` and `export` by default; it is in the package."""


def tokenizer_option(command: argparse.ArgumentParser) -> None:
    """Add `--tokenizer` and `--device`."""
    command.add_argument(
        "--tokenizer",
        default=SHIPPED,
        help="directory, hub id, or a tokenizer of the package (default: %(default)s, for 64 x 64 pixels)",
    )
    command.add_argument("--device", help="for example cuda")


def fit_option(command: argparse.ArgumentParser, default: str = "") -> None:
    """Add `--fit`. default: "" stands for "refuse", but "crop" for the shipped tokenizer."""
    told = default or f"refuse, but crop for {SHIPPED}"
    command.add_argument(
        "--fit",
        choices=("refuse", "crop", "pad", "resize"),
        default=default,
        help=f"for images of another size (default: {told})",
    )


def load_tokenizer(options: argparse.Namespace) -> Any:
    """The tokenizer that the options name."""
    from tokenizers_mm.models.loading import load  # after the arguments are known to be good

    return load(options.tokenizer, device=getattr(options, "device", None))
