"""`tokenizers-mm compare`."""

import argparse
import sys
from pathlib import Path
from typing import Any

from tokenizers_mm.cli.eval import measure, print_table, run_options

SUMMARY = "Two tokenizers side by side: a sheet of images, a table, and which is better."


def add_arguments(command: argparse.ArgumentParser) -> None:
    """Add the arguments of the verb."""
    command.add_argument("first", metavar="A", help="a tokenizer or a codec, as of `eval`")
    command.add_argument("second", metavar="B", help="the same")
    run_options(command)
    command.add_argument(
        "--out", type=Path, default=Path("compare.png"), help="the sheet, a .png (default: %(default)s)"
    )


def run(options: argparse.Namespace) -> None:
    """Compare, and write the sheet."""
    from tokenizers_mm._check import require
    from tokenizers_mm._files import file_place

    require(options.out.suffix == ".png", "out", "a file name that ends in .png", str(options.out))
    file_place(options.out)
    for name in (options.first, options.second):
        require(not name.endswith("@curve"), name, "one quality (@match, @q75, @2000b or @0.25bpp)", "several")
    finished = measure(options, [options.first, options.second], None)
    from tokenizers_mm.eval.page import choose_examples
    from tokenizers_mm.eval.pictures import save_picture, side_by_side
    from tokenizers_mm.eval.report import make_report

    report = make_report(finished, sys.argv[1:])
    for message in report["images"]["skipped"]:
        print(f"skipped: {message}", file=sys.stderr)
    examples = choose_examples(report, finished)
    rows = [[example.original, *example.made] for example in examples]
    save_picture(side_by_side(rows, ["original", *(row["name"] for row in report["tokenizers"])]), options.out)
    print_table(report)
    print(verdict(report))
    print(f"{options.out}: {len(rows)} of {report['images']['count']} images")


def verdict(report: Any) -> str:
    """One sentence per metric that tells the two apart at the level of 5 %, or that none does; then the bits."""
    from tokenizers_mm.eval.metrics import METRICS
    from tokenizers_mm.eval.report import heading

    lines = []
    for pair in report["pairs"]:
        metric = METRICS[pair["metric"]]
        if pair["p"] < 0.05 and not metric.name.startswith("bits"):
            ahead = (pair["difference"] > 0) == (metric.better == "higher")
            first, second = (pair["a"], pair["b"]) if ahead else (pair["b"], pair["a"])
            sign = 1 if pair["difference"] > 0 else -1
            low, high = sorted((sign * pair["low"], sign * pair["high"]))
            lines.append(
                f"{heading(metric.name)}: {first} is better than {second} by {abs(pair['difference']):.4g} "
                f"(95 % interval {low:.4g} to {high:.4g}, p {pair['p']:.2g})"
            )
    lines = lines or ["no metric tells them apart at the level of 5 %"]
    bits = [(row["name"], row["metrics"]["bits"]["mean"]) for row in report["tokenizers"] if "bits" in row["metrics"]]
    if bits:
        (a, first), (b, second) = bits
        lines.append(f"{a} takes {first:,.0f} bits per image, {b} {second:,.0f}")
    return "\n".join(lines)
