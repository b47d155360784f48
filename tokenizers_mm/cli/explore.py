"""`tokenizers-mm explore`."""

import argparse
import sys
from pathlib import Path

from tokenizers_mm._check import printable
from tokenizers_mm.cli.options import SHIPPED, load_tokenizer

SUMMARY = "A page in which ids are looked at, swapped and decoded in the browser."


def add_arguments(command: argparse.ArgumentParser) -> None:
    """Add the arguments of the verb."""
    command.add_argument("tokenizer", nargs="?", default=SHIPPED, help="directory or hub id (default: %(default)s)")
    command.add_argument(
        "--images", nargs="+", type=Path, required=True, metavar="IMAGE", help="image files and folders of them"
    )
    command.add_argument("--limit", type=int, default=64, help="images at most (default: %(default)s)")
    command.add_argument(
        "--fit",
        choices=("refuse", "crop", "pad", "resize"),
        default="crop",
        help="for images of another size (default: %(default)s)",
    )
    command.add_argument("--size", type=int, nargs=2, metavar=("HEIGHT", "WIDTH"), help="where any size is taken")
    command.add_argument(
        "--runtime",
        type=Path,
        metavar="FOLDER",
        help="the npm package onnxruntime-web (default: node_modules/onnxruntime-web here or in a folder above)",
    )
    command.add_argument("--out", type=Path, default=Path("explorer"), help="folder of the page (default: %(default)s)")


def run(options: argparse.Namespace) -> None:
    """Write the page and print its name."""
    from tokenizers_mm.data.sources import list_images
    from tokenizers_mm.export.explorer import explore

    paths: list[Path] = []
    for path in options.images:
        paths += list_images(path) if path.is_dir() else [path]
    size = tuple(options.size) if options.size else None
    tokenizer = load_tokenizer(options)
    found = paths[: max(options.limit, 0)]
    refused = (lambda error: print(f"skipped: {printable(str(error))}", file=sys.stderr)) if len(found) > 1 else None
    name = str(options.tokenizer)
    print(explore(tokenizer, name, found, options.out, options.fit, size, options.runtime, refused))
