"""Options that several verbs have."""

import argparse
from pathlib import Path
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


def input_options(command: argparse.ArgumentParser, metavar: str, kinds: str) -> None:
    """Add the input of `encode` and `tokenize`, and how its images become codes. kinds: of files, for the help."""
    command.add_argument("images", nargs="+", type=Path, metavar=metavar, help=kinds)
    tokenizer_option(command)
    fit_option(command)
    command.add_argument("--strict", action="store_true", help="end at the first image that cannot be encoded")
    command.add_argument("--batch-size", type=int, help="images of a batch (default: by their size)")


def counted(count: int) -> str:
    """A number of images in words."""
    return f"{count} image{'' if count == 1 else 's'}"


def load_tokenizer(options: argparse.Namespace) -> Any:
    """The tokenizer that the options name."""
    from tokenizers_mm.models.loading import load  # after the arguments are known to be good

    return load(options.tokenizer, device=getattr(options, "device", None))
