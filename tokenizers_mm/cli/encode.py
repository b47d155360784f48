"""`tokenizers-mm encode`."""

import argparse
import sys
from pathlib import Path
from typing import Any

from tokenizers_mm._check import fail
from tokenizers_mm.cli.boundary import printable
from tokenizers_mm.cli.options import SHIPPED, fit_option, load_tokenizer, tokenizer_option

SUMMARY = "Images to ids."


def add_arguments(command: argparse.ArgumentParser) -> None:
    """Add the arguments of the verb."""
    command.add_argument("images", nargs="+", type=Path, metavar="IMAGE", help="image files and folders of them")
    tokenizer_option(command)
    fit_option(command)
    command.add_argument("--strict", action="store_true", help="end at the first image that cannot be encoded")
    command.add_argument(
        "--out", type=Path, default=Path("ids.safetensors"), help="a .safetensors or .npz file (default: %(default)s)"
    )


def run(options: argparse.Namespace) -> None:
    """Encode images and write one file of ids."""
    from tokenizers_mm.data.codes import check_output, write_codes
    from tokenizers_mm.data.sources import list_images

    check_output(options.out)
    fit = options.fit or ("crop" if options.tokenizer == SHIPPED else "refuse")
    paths: list[Path] = []
    for path in options.images:
        paths += list_images(path) if path.is_dir() else [path]
    tokenizer = load_tokenizer(options)
    skipped: list[str] = []
    tolerant = len(paths) > 1 and not options.strict
    report = (lambda _, error: _skip(error, skipped)) if tolerant else None
    found: dict[int, Any] = {}
    for indices, batch in tokenizer.encode_batches(paths, fit, report):
        found.update(zip(indices, batch.to("cpu").unbind(), strict=True))
    if not found:
        fail("images", "at least one readable image", f"none ({len(skipped)} refused)")
    order = sorted(found)
    write_codes(options.out, [found[i] for i in order], [printable(paths[i]) for i in order], tokenizer.family)
    count = f"{len(found)} images" + (f", {len(skipped)} skipped" if skipped else "")
    print(f"{options.out}: {count}")


def _skip(error: ValueError, skipped: list[str]) -> None:
    skipped.append(printable(error))
    print(f"skipped: {skipped[-1]}", file=sys.stderr)
