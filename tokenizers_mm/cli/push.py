"""`tokenizers-mm push`."""

import argparse
import sys
from pathlib import Path

SUMMARY = "A tokenizer to the Hugging Face hub, with a card of its measurements and an app."

REPORTS = ("report.json", "report/report.json", "../report.json", "../report/report.json")
"""Places of a report of `tokenizers-mm eval`, from the tokenizer's directory."""


def add_arguments(command: argparse.ArgumentParser) -> None:
    """Add the arguments of the verb."""
    command.add_argument("directory", metavar="DIR", help="directory of the tokenizer")
    command.add_argument("repo", metavar="REPO", help="hub id, OWNER/NAME")
    command.add_argument("--report", type=Path, help="report of `eval` (default: report.json in or beside DIR)")
    command.add_argument("--license", help="licence of the weights, such as apache-2.0 (default: what DIR states)")
    command.add_argument("--private", action="store_true", default=None, help="make a private repository")
    command.add_argument("--space", metavar="OWNER/NAME", help="make a Gradio Space that shows it, too")
    command.add_argument("--out", type=Path, help="write the files to this folder and upload nothing")


def run(options: argparse.Namespace) -> None:
    """Write the card and the app beside the weights, and upload all as one commit."""
    from tokenizers_mm.eval.report import read_report
    from tokenizers_mm.models.card import measurements
    from tokenizers_mm.models.loading import load
    from tokenizers_mm.models.publishing import push, save

    tokenizer = load(options.directory)
    path = options.report or _report(Path(options.directory))
    report = None if path is None else measurements(read_report(path), Path(options.directory).name)
    if not (options.license or tokenizer.provenance.license):
        print("no licence is stated, and others may not use the weights without one: --license", file=sys.stderr)
    told = "no report of measurements" if path is None else f"measurements of {path}"
    if options.out is not None:
        save(tokenizer, options.out, report, options.license, options.repo)
        print(f"{options.out}: card, app and weights; {told}")
        return
    address = push(
        tokenizer, options.repo, report=report, license=options.license, private=options.private, space=options.space
    )
    print(f"{address} ({told})")


def _report(directory: Path) -> Path | None:
    return next((directory / place for place in REPORTS if (directory / place).is_file()), None)
