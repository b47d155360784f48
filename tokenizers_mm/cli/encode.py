"""`tokenizers-mm encode`."""

import argparse
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from tokenizers_mm.cli.options import SHIPPED, counted, input_options, load_tokenizer
from tokenizers_mm.cli.progress import Progress

SUMMARY = "Images to ids: one file, or a folder of shards."

PART = 1024
"""Images of a part: what a run that was interrupted may have to do again."""

SHOWN = 20
"""Images left out that are named on the screen."""


def add_arguments(command: argparse.ArgumentParser) -> None:
    """Add the arguments of the verb."""
    input_options(command, "IMAGES", "image files, folders of them, .tar or .parquet files")
    command.add_argument("--stable", action="store_true", help="ids that depend on no batch, machine or dtype")
    command.add_argument("--workers", type=int, default=1, help="threads that read images ahead (default: %(default)s)")
    command.add_argument(
        "--out",
        default="ids.safetensors",
        help="a .safetensors, .npz or .parquet file, or a name that ends in / for a folder of Parquet shards "
        "(default: %(default)s); a run that was interrupted goes on when it is started again",
    )


def run(options: argparse.Namespace) -> None:
    """Encode images and write one file or a folder of ids."""
    folder = options.out.endswith("/") or Path(options.out).is_dir()
    options.out = Path(options.out)
    if folder:
        from tokenizers_mm.cli import tokenize  # a folder: the same as that verb

        tokenize.run_with(options, "parquet", processes=0)
        return
    from tokenizers_mm.data.codes import check_output, write_codes
    from tokenizers_mm.data.token_shards import read_shards

    check_output(options.out)
    from tokenizers_mm.data.shard_engines import run_here
    from tokenizers_mm.data.tokenizing import Encoding, Job, forget, largest_of

    open_input = partial(open_images, options.images)
    rows, tokenizer = open_input(), load_tokenizer(options)
    strict = options.strict or len(rows) == 1
    how = Encoding(fit_of(options), options.stable, options.batch_size, options.workers, strict)
    parts = options.out.parent / f".{options.out.name}.parts"
    job = Job(open_input, partial(load_tokenizer, options), parts, "npz", PART, how)

    def write(manifest: dict[str, Any]) -> None:
        if manifest["images"]:
            first: Any = next(read_shards(parts))
            largest = largest_of(tokenizer.streams(first.height, first.width))
            write_codes(options.out, lambda: read_shards(parts), tokenizer.fingerprint(), largest)  # type: ignore[arg-type]
        forget(job)

    manifest = carry_out(job, rows, tokenizer, partial(run_here, job, rows, tokenizer), then=write)
    closing(options.out, manifest, tokenizer if options.stable else None)


def carry_out(
    job: Any,
    rows: Any,
    tokenizer: Any,
    work: Callable[[list[int], Progress], None],
    unit: str = "images",
    then: Callable[[dict[str, Any]], None] | None = None,
) -> dict[str, Any]:
    """Make the shards of a job that are missing, and the manifest, which is returned; names what was left out.

    work: makes the shards of some numbers and tells the progress. then: what follows while the folder is still this
    process's own; where it is given, what another run left in the folder is removed.
    """
    from tokenizers_mm.data.tokenizing import begun, finish, plan

    planned = plan(job, rows, tokenizer)
    with begun(job, planned, anew=then is not None) as missing:
        with Progress(len(rows), done_rows(len(rows), job.shard_size, missing), unit) as progress:
            work(missing, progress)
        manifest = finish(job, planned)
        report_failures(manifest)
        if then is not None:
            then(manifest)
    return manifest


def open_images(paths: list[Path]) -> Any:
    """The images of files and folders as an input."""
    from tokenizers_mm.data.open_images import open_image_set
    from tokenizers_mm.data.tokenizing import ImageRows

    return ImageRows(open_image_set(paths))


def fit_of(options: argparse.Namespace) -> Any:
    """Treatment of images of another size."""
    return options.fit or ("crop" if options.tokenizer == SHIPPED else "refuse")


def done_rows(total: int, shard_size: int, missing: list[int]) -> int:
    """Rows of the shards that are done; tells the user where the run goes on."""
    left = sum(min(shard_size, total - number * shard_size) for number in missing)
    if left < total:
        print(f"resumed: {total - left} of {total} rows are done", file=sys.stderr)
    return total - left


def report_failures(manifest: dict[str, Any]) -> None:
    """Name the first images that were left out, and count all by cause."""
    for failure in manifest["failed"][:SHOWN]:
        print(f"skipped: {failure['reason']}", file=sys.stderr)
    if manifest["failures"] > SHOWN:
        counts = ", ".join(f"{count} not {cause}" for cause, count in manifest["failures_by_cause"].items())
        print(f"skipped in all: {manifest['failures']} ({counts})", file=sys.stderr)


def closing(out: Path, manifest: dict[str, Any], tokenizer: Any) -> None:
    """Print what was made; ValueError where nothing was. tokenizer: whose stable ids to report on."""
    from tokenizers_mm._check import fail

    if not manifest["images"]:
        fail("images", "at least one readable image", f"none ({manifest['failures']} refused)")
    skipped = f", {manifest['failures']} skipped" if manifest["failures"] else ""
    print(f"{out}: {counted(manifest['images'])}{skipped}")
    if tokenizer is not None and tokenizer.stability.images:
        print(f"stable: {tokenizer.stability}")
