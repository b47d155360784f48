"""`tokenizers-mm eval`."""

import argparse
import sys
from pathlib import Path

from tokenizers_mm.cli.options import fit_option, load_tokenizer, tokenizer_option

SUMMARY = "Metrics over a folder of images, as JSON."


def add_arguments(command: argparse.ArgumentParser) -> None:
    """Add the arguments of the verb."""
    tokenizer_option(command)
    fit_option(command, default="crop")
    command.add_argument("--images", type=Path, required=True)
    command.add_argument("--inception", help="weights file for rFID (default: torch.hub's cache)")
    command.add_argument("--out", type=Path, required=True)


def run(options: argparse.Namespace) -> None:
    """Evaluate a tokenizer and write the report."""
    from tokenizers_mm._files import file_place, write_json
    from tokenizers_mm.data.files import list_images
    from tokenizers_mm.eval.report import evaluate

    file_place(options.out)
    paths = list_images(options.images)
    report = evaluate(load_tokenizer(options), paths, options.fit, options.inception)
    write_json(options.out, report)
    for message in report["skipped"]:
        print(f"skipped: {message}", file=sys.stderr)
    quality = "infinite" if report["psnr"] is None else f"{report['psnr']:.2f} dB"
    print(f"{options.out}: {report['images']} images, PSNR {quality}, SSIM {report['ssim']:.4f}")
