"""`tokenizers-mm eval`."""

import argparse
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from tokenizers_mm._check import expecting, fail, require
from tokenizers_mm._files import atomic_directory, file_place, kind_of, one_writer, write_json, write_text
from tokenizers_mm.cli.options import SHIPPED

SUMMARY = "Metrics of any number of tokenizers over images: a report as JSON and as one page."

WEIGHTS = ("inception", "vgg16", "dists", "tower")
"""Files of weights that metrics take; `tower` is a directory."""


def add_arguments(command: argparse.ArgumentParser) -> None:
    """Add the arguments of the verb."""
    command.add_argument(
        "tokenizers",
        nargs="*",
        metavar="TOKENIZER",
        help="directory (ours, diffusers' or transformers' VQ), hub id, or a codec: jpeg@match (at the bits of the "
        f"first tokenizer), @curve, @q75, @2000b, @0.25bpp; also webp, avif, jxl (default: {SHIPPED})",
    )
    command.add_argument("--tokenizer", help="the same, for one tokenizer")
    command.add_argument("--join", type=Path, nargs="+", metavar="REPORT", help="put reports in one table; no images")
    command.add_argument("--any-protocol", action="store_true", help="with --join: also reports of several protocols")
    run_options(command)
    command.add_argument(
        "--out",
        type=Path,
        default=Path("report"),
        help="folder for report.json and report.html, or one .json file (default: %(default)s)",
    )


def run_options(command: argparse.ArgumentParser) -> None:
    """Add what a run over images needs, of `eval` and of `compare`."""
    command.add_argument(
        "--images",
        help="folder of images or of tar files, `photographs` (crops that packages carry) or `scenes` (rendered, with "
        "captions)",
    )
    command.add_argument("--limit", type=int, help="take the first N images only")
    command.add_argument("--protocol", default="default", help="how images are prepared (default: %(default)s)")
    command.add_argument("--size", type=int, help="side of the images, in place of the protocol's own")
    command.add_argument(
        "--fit", choices=("adm", "refuse", "crop", "pad", "resize"), help="in place of the protocol's own"
    )
    command.add_argument("--metrics", help="names with commas, or `all` (default: those that can be measured here)")
    command.add_argument("--weights", nargs="+", default=[], metavar="NAME=FILE", help=f"of {', '.join(WEIGHTS)}")
    command.add_argument("--inception", help="the same as --weights inception=FILE")
    command.add_argument("--extractor", default="", help="registered with torch-fidelity, in place of Inception")
    command.add_argument("--seed", type=int, default=0, help="of intervals and splits")
    command.add_argument("--device", default="cpu", help="for example cuda (default: %(default)s)")


def run(options: argparse.Namespace) -> None:
    """Evaluate, and write the report."""
    single = options.out.suffix == ".json"
    if single:
        file_place(options.out)
    elif options.out.exists():
        require(
            options.out.is_dir(), f"output {options.out}", "a folder, a new name or a .json file", kind_of(options.out)
        )
    if options.join:
        report, page = _joined(options), None
    else:
        names = [*options.tokenizers, *([options.tokenizer] if options.tokenizer else [])] or [SHIPPED]
        finished = measure(options, names, None if single else options.out)
        from tokenizers_mm.eval.report import make_report

        report = make_report(finished, sys.argv[1:])
        page = finished
    from tokenizers_mm.eval.report import flat

    for message in report["images"]["skipped"]:
        print(f"skipped: {message}", file=sys.stderr)
    with expecting("report", "one that tokenizers-mm eval wrote") if options.join else nullcontext():
        if single:
            one = len(report["tokenizers"]) == 1
            write_json(options.out, flat(report) if one else report)
        else:
            from tokenizers_mm.eval.page import make_page
            from tokenizers_mm.eval.run import PARTIAL

            text = make_page(report, page)
            with atomic_directory(options.out) as folder:
                write_json(folder / "report.json", report)
                write_text(folder / "report.html", text)
            (options.out / PARTIAL).unlink(missing_ok=True)
        print_table(report)
    print(f"{options.out}: {report['images']['count']} images")


def measure(options: argparse.Namespace, names: list[str], out: Path | None) -> Any:
    """A finished run over the images that the options name."""
    require(bool(options.images), "images", "--images FOLDER", "none")
    require(options.limit is None or options.limit > 0, "limit", "a positive number", options.limit)
    from tokenizers_mm.checkpoints.store import load
    from tokenizers_mm.eval.base import Setup
    from tokenizers_mm.eval.candidates import open_candidates
    from tokenizers_mm.eval.images import ImageSource
    from tokenizers_mm.eval.metrics import METRICS
    from tokenizers_mm.eval.protocols import protocol_by_name
    from tokenizers_mm.eval.run import begin, carry_out, common_size
    from tokenizers_mm.models.loading import usable_device

    protocol = protocol_by_name(options.protocol, options.fit, options.size)
    weights = {"inception": options.inception} if options.inception else {}
    for item in options.weights:
        name, _, path = item.partition("=")
        require(name in WEIGHTS and bool(path), "weights", f"NAME=FILE with one of {', '.join(WEIGHTS)}", item)
        weights[name] = path
    device = str(usable_device(options.device))
    candidates = open_candidates(names, lambda name: load(name, device=device), device)
    size, _ = common_size(candidates, protocol)
    source = ImageSource.at(options.images, options.limit, size[0] if size else 256)
    every = options.metrics == "all"
    metrics = (
        list(METRICS) if every else [name.strip() for name in options.metrics.split(",")] if options.metrics else None
    )
    setup = Setup(protocol, weights, options.extractor, device, options.seed)
    begun = begin(candidates, source, setup, metrics, strict=not every)
    with nullcontext() if out is None else one_writer(out, f"output {out}"):
        return carry_out(begun, out, progress_line())


def _joined(options: argparse.Namespace) -> dict[str, Any]:
    """One report of several files, or of the folders that they stand in."""
    from tokenizers_mm.eval.report import join_reports, read_report

    if options.images or options.tokenizers or options.tokenizer:
        fail("join", "reports alone", "images or tokenizers beside them")
    return join_reports([read_report(path) for path in options.join], options.any_protocol)


def progress_line() -> Callable[[int, int], None] | None:
    """A function that draws a bar with the time left on stderr; None where that is no terminal."""
    if not sys.stderr.isatty():
        return None
    start, first = time.monotonic(), -1

    def show(done: int, total: int) -> None:
        nonlocal first
        first = done if first < 0 else first
        spent, made = time.monotonic() - start, done - first
        left = f", {spent / made * (total - done):.0f} s left" if made else ""
        bar = "#" * round(30 * done / total)
        print(f"\r[{bar:30}] {done} of {total} images{left}\033[K", end="\n" if done == total else "", file=sys.stderr)

    return show


def print_table(report: Any) -> None:
    """Print the table of a report, and once each reason why a metric is missing."""
    from tokenizers_mm.eval.report import table

    rows = table(report)
    turned = [list(column) for column in zip(*rows, strict=True)] if len(rows) <= len(rows[0]) else rows
    widths = [max(len(row[i]) for row in turned) for i in range(len(turned[0]))]
    for row in turned:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
    for reason in dict.fromkeys(reason for row in report["tokenizers"] for reason in row["missing"].values()):
        print(f"left out: {reason}", file=sys.stderr)
