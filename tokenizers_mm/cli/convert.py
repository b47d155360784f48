"""`tokenizers-mm convert`."""

import argparse
from pathlib import Path

from tokenizers_mm._check import fail

SUMMARY = "A published checkpoint into our format."


def add_arguments(command: argparse.ArgumentParser) -> None:
    """Add the arguments of the verb."""
    command.add_argument("family", metavar="FAMILY", help="tokenflow, dualvitok or mar")
    command.add_argument("checkpoint", type=Path, metavar="CHECKPOINT", help=".pt, .pth, .bin, .ckpt or .safetensors")
    command.add_argument("options", nargs="*", metavar="key=value", help="what the file cannot say, see the family")
    command.add_argument("--out", type=Path, required=True)
    command.add_argument("--config", type=Path, help="JSON: the dimensions of an unpublished size")


def run(options: argparse.Namespace) -> None:
    """Convert a checkpoint and print a summary."""
    from tokenizers_mm.checkpoints.convert import convert
    from tokenizers_mm.models.loading import read_json

    config = None if options.config is None else read_json(options.config)
    bad = [item for item in options.options if "=" not in item]
    if bad:
        fail("option", "key=value", bad[0])
    extra = dict(item.split("=", 1) for item in options.options)
    print(convert(options.family, options.checkpoint, options.out, config, **extra))
