"""`tokenizers-mm convert`."""

import argparse
import sys
from pathlib import Path

from tokenizers_mm._check import fail

SUMMARY = "A published checkpoint into our format."


def add_arguments(command: argparse.ArgumentParser) -> None:
    """Add the arguments of the verb."""
    command.add_argument("family", nargs="?", metavar="FAMILY", help="a name of --list")
    command.add_argument(
        "checkpoint",
        nargs="?",
        type=Path,
        metavar="CHECKPOINT",
        help=".pt, .pth, .bin, .ckpt or .safetensors, an .index.json, or a folder with one",
    )
    command.add_argument("options", nargs="*", metavar="key=value", help="what the file cannot say, see the family")
    command.add_argument("--out", type=Path)
    command.add_argument("--list", action="store_true", help="the families, their files and licences, and end")
    command.add_argument("--config", type=Path, help="JSON: the dimensions of an unpublished size")


def run(options: argparse.Namespace) -> None:
    """Convert a checkpoint and print a summary."""
    if options.list:
        from tokenizers_mm.checkpoints.convert import table

        print("\n".join(table()))
        return
    for name in ("family", "checkpoint", "out"):
        if getattr(options, name) is None:
            fail("--out" if name == "out" else name.upper(), "a value (or --list)", "nothing")
    from tokenizers_mm.checkpoints.convert import convert
    from tokenizers_mm.config import read_json

    config = None if options.config is None else read_json(options.config)
    bad = [item for item in options.options if "=" not in item]
    if bad:
        fail("option", "key=value", bad[0])
    extra = dict(item.split("=", 1) for item in options.options)
    out = convert(options.family, options.checkpoint, options.out, config, **extra)
    print(out)
    origin = read_json(out / "config.json")["provenance"]
    print(" ".join(part for part in (f"licence: {origin['license']}.", origin["notice"]) if part), file=sys.stderr)
