"""`tokenizers-mm tokenize`."""

import argparse
from functools import partial
from pathlib import Path
from typing import Any

from tokenizers_mm.cli.encode import carry_out, closing, fit_of, open_images
from tokenizers_mm.cli.options import input_options, load_tokenizer
from tokenizers_mm.cli.progress import Progress

SUMMARY = "Images or records to shards of ids, for training; resumes, and gives the same bytes."


def add_arguments(command: argparse.ArgumentParser) -> None:
    """Add the arguments of the verb."""
    kinds = "folders, image files, .tar shards, .parquet files; or one .jsonl file of records"
    input_options(command, "INPUT", kinds)
    command.add_argument("--out", type=Path, required=True, help="folder of the shards; a run that is in it goes on")
    command.add_argument(
        "--format",
        choices=("webdataset", "parquet", "jsonl"),
        help="of the shards (default: webdataset; jsonl, which only records have, for records)",
    )
    command.add_argument("--shard-size", type=int, default=1000, help="rows of a shard (default: %(default)s)")
    command.add_argument(
        "--workers", type=int, default=1, help="processes, each with the tokenizer in memory (default: %(default)s)"
    )
    command.add_argument(
        "--engine", choices=("local", "ray"), default="local", help="this machine, or Ray Data (default: %(default)s)"
    )
    command.add_argument(
        "--no-stable",
        dest="stable",
        action="store_false",
        help="do not decide near ties again in float64: ids may then depend on batch, machine and dtype",
    )


def run(options: argparse.Namespace) -> None:
    """Make the shards that are missing, and the manifest."""
    records = any(path.suffix == ".jsonl" for path in options.images)
    form = options.format or ("jsonl" if records else "webdataset")
    run_with(options, form, options.workers, options.shard_size, options.engine)


def run_with(
    options: argparse.Namespace, form: str, processes: int, shard_size: int = 1000, engine: str = "local"
) -> None:
    """Make shards of a format. processes: 0 for this process alone; `options.workers` are then reading threads."""
    from tokenizers_mm._check import require
    from tokenizers_mm.data.codes import import_arrow
    from tokenizers_mm.data.shard_engines import run_here, run_processes, run_ray
    from tokenizers_mm.data.tokenizing import Encoding, Job

    records = any(path.suffix == ".jsonl" for path in options.images)
    require(not records or len(options.images) == 1, "records", "one .jsonl file by itself", options.images)
    require(form != "jsonl" or records, "format", "webdataset or parquet for images", form)
    require(shard_size > 0 and processes >= 0, "shard-size and workers", "positive numbers", (shard_size, processes))
    if form == "parquet":
        import_arrow()
    open_input = partial(open_records, options.images[0]) if records else partial(open_images, options.images)
    rows, tokenizer = open_input(), load_tokenizer(options)
    ahead = options.workers if processes == 0 else 1
    how = Encoding(fit_of(options), options.stable, options.batch_size, ahead, options.strict)
    job = Job(open_input, partial(load_tokenizer, options), options.out, form, shard_size, how)

    def work(missing: list[int], progress: Progress) -> None:
        if engine == "ray":
            run_ray(job, missing, max(1, processes), progress)
        elif processes > 1 and len(missing) > 1:
            run_processes(job, missing, min(processes, len(missing)), progress)
        else:
            run_here(job, rows, tokenizer, missing, progress)

    manifest = carry_out(job, rows, tokenizer, work, "rows" if records else "images")
    closing(options.out, manifest, tokenizer if options.stable else None)


def open_records(path: Path) -> Any:
    """The records of a file as an input."""
    from tokenizers_mm.llm.records import RecordRows

    return RecordRows.open(path)
