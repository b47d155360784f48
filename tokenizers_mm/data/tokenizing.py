"""From a set of images to shards of ids: resumable, the same bytes however often it was interrupted, on any engine.

The input is cut into ranges of `shard_size` rows, and a range becomes a shard. A shard is written in one move, and then
a small file that says it is done; a run that finds that file goes on with the next shard. Everything in a shard follows
from the input, the tokenizer and the options (with stable ids), so that a shard that was lost is made again as it was.
"""

import json
import os
import shutil
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from dataclasses import asdict, dataclass, replace
from hashlib import sha256
from multiprocessing import get_context
from pathlib import Path
from typing import Any, Protocol

from PIL import Image

from tokenizers_mm._check import fail, require, shorten
from tokenizers_mm._files import write_json
from tokenizers_mm._images import Fit, decode_image
from tokenizers_mm.data.codes import CodesOfImage
from tokenizers_mm.data.image_sets import ImageSet
from tokenizers_mm.data.token_shards import DONE, MANIFEST, SHARD_ENDINGS, Row, write_shard
from tokenizers_mm.types import ImageCodes

PLAN = "plan.json"
"""File that says what the run in a folder is."""

SHOWN_FAILURES = 1000
"""Failures of a shard that are kept one by one; those after them are only counted, by cause."""


@dataclass(frozen=True)
class Encoding:
    """How images become codes. See `ImageTokenizer.encode_batches`; strict: a failure ends the run."""

    fit: Fit = "refuse"
    stable: bool = True
    batch_size: int | None = None
    read_ahead: int = 1
    strict: bool = False


@dataclass(frozen=True)
class Failure:
    """A row that could not be encoded: its number, its name, and the sentence that says why."""

    row: int
    name: str
    reason: str

    @property
    def cause(self) -> str:
        """What was expected: the same words for failures of one kind."""
        return self.reason.partition(": expected ")[2].rpartition(", got ")[0] or "something else"


class Rows(Protocol):
    """An input: rows by number, and how a range of them becomes rows with codes."""

    def __len__(self) -> int: ...

    def fingerprint(self) -> str:
        """A digest: the same for the same input."""
        ...

    def encode(
        self, tokenizer: Any, numbers: range, how: Encoding, step: Callable[[int], None]
    ) -> tuple[list[tuple[int, Row]], list[Failure], int, int]:
        """Rows with their numbers, failures, images encoded, and the largest id that the tokenizer has.

        step: called with the number of rows that are done since the last call.
        """
        ...


class ImageRows:
    """Images of a set as the input: a row per image, with its name and caption."""

    def __init__(self, images: ImageSet) -> None:
        self.images = images

    def __len__(self) -> int:
        return len(self.images)

    def fingerprint(self) -> str:
        return self.images.fingerprint()

    def encode(
        self, tokenizer: Any, numbers: range, how: Encoding, step: Callable[[int], None]
    ) -> tuple[list[tuple[int, Row]], list[Failure], int, int]:
        captions: dict[int, str] = {}
        names: dict[int, str] = {}
        failures: list[Failure] = []

        def opener(number: int) -> Callable[[], Image.Image]:
            def read() -> Image.Image:
                image, captions[number], _ = self.images.read(number)
                return image

            return read

        def refused(index: int, error: ValueError) -> None:
            if how.strict:
                raise error
            reason = shorten(readable(str(error)), 500)
            failures.append(Failure(numbers[index], names.pop(numbers[index]), reason))
            step(1)

        def pair(number: int) -> tuple[str, Callable[[], Image.Image]]:
            names[number] = readable(self.images.name(number))
            return f"image {names[number]}", opener(number)

        found: dict[int, Row] = {}
        largest = 0
        for indices, codes in encode_pairs(tokenizer, map(pair, numbers), how, refused):
            largest = max(largest, largest_id(codes))
            for index, each in zip(indices, CodesOfImage.each(codes), strict=True):
                number = numbers[index]
                found[number] = replace(each, name=names.pop(number), caption=captions.pop(number, ""))
            step(len(indices))
        return sorted(found.items()), sorted(failures, key=lambda failure: failure.row), len(found), largest


def encode_pairs(
    tokenizer: Any,
    pairs: Iterator[tuple[str, Any]],
    how: Encoding,
    refused: Callable[[int, ValueError], None],
) -> Iterator[tuple[list[int], Any]]:
    """`ImageTokenizer.encode_batches` with the options of a run."""
    return tokenizer.encode_batches(
        pairs, how.fit, refused, stable=how.stable, batch_size=how.batch_size, workers=how.read_ahead
    )


def largest_id(codes: Any) -> int:
    """The largest id that a tokenizer can give, from codes of it; 0 for latents."""
    return max((s.codebook_size for s in codes.streams), default=1) - 1 if isinstance(codes, ImageCodes) else 0


def readable(text: str) -> str:
    """A text as UTF-8 can hold it: bytes of file names that are none are escaped."""
    return text.encode("utf-8", errors="backslashreplace").decode()


class EncodeBatch:
    """A batch of rows as columns -> the same with ids: for `datasets.Dataset.map(batched=True)` and Ray Data.

    `batch["image"]` holds images as bytes, PIL images, paths, or mappings with `bytes` or `path`. It is replaced by
    `ids` (a list of int64 arrays) or `latents`, `height` and `width`; `error` is "" or says why a row has none. Every
    other column is kept.
    """

    def __init__(self, load: Callable[[], Any], how: Encoding = Encoding()) -> None:
        """load: gives the tokenizer, once, in the process that encodes."""
        self.load, self.how = load, how
        self._tokenizer: Any = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_tokenizer": None}

    def __call__(self, batch: Mapping[str, Any]) -> dict[str, Any]:
        if self._tokenizer is None:
            self._tokenizer = self.load()
        items = list(batch["image"])
        rows: list[dict[str, Any]] = [{"error": ""} for _ in items]

        def refused(index: int, error: ValueError) -> None:
            if self.how.strict:
                raise error
            rows[index]["error"] = str(error)

        pairs = ((f"image {index}", _opener(item, index)) for index, item in enumerate(items))
        for indices, codes in encode_pairs(self._tokenizer, pairs, self.how, refused):
            for index, one in zip(indices, CodesOfImage.each(codes), strict=True):
                rows[index] |= {"height": one.height, "width": one.width}
                rows[index]["ids" if one.grid is None else "latents"] = one.values.numpy()
        kind = "latents" if any("latents" in row for row in rows) else "ids"
        columns = {key: [row.get(key) for row in rows] for key in (kind, "height", "width", "error")}
        return {**{key: value for key, value in batch.items() if key != "image"}, **columns}


def _opener(item: Any, index: int) -> Any:
    """What `encode_batches` opens: an image, a path, or a function."""
    if isinstance(item, Mapping):
        item = item.get("bytes") or item.get("path")
    if isinstance(item, (bytes, bytearray)):
        return lambda: decode_image(bytes(item), f"image {index}")
    if isinstance(item, (str, os.PathLike, Image.Image)):
        return item

    def nothing() -> Any:
        fail(f"image {index}", "bytes, a path or a PIL image", item)

    return nothing


@dataclass(frozen=True)
class Job:
    """One run: what becomes what, in which folder.

    open_input and load: make the input and the tokenizer in the process that needs them; they must be picklable.
    format: a key of `SHARD_ENDINGS`.
    """

    open_input: Callable[[], Rows]
    load: Callable[[], Any]
    out: Path
    format: str
    shard_size: int
    how: Encoding

    def file(self, number: int) -> str:
        """Name of a shard."""
        return f"part-{number:05d}{SHARD_ENDINGS[self.format]}"

    def done_file(self, number: int) -> Path:
        """The file that says that a shard is done."""
        return self.out / DONE / f"{number:05d}.json"


def plan(job: Job, rows: Rows, tokenizer_hash: str, family: str) -> dict[str, Any]:
    """All that decides the bytes of the shards: what a run that goes on must have in common with the first."""
    how = asdict(job.how)
    kept = {"fit": how["fit"], "stable": how["stable"]}
    if not job.how.stable:
        kept["batch_size"] = how["batch_size"]
    return {
        "library": "tokenizers_mm",
        "format": job.format,
        "family": family,
        "tokenizer": tokenizer_hash,
        "input": rows.fingerprint(),
        "rows": len(rows),
        "shard_size": job.shard_size,
        "encoding": kept,
    }


def can_resume(job: Job, planned: Mapping[str, Any]) -> bool:
    """Whether the folder is new, or holds the same run."""
    return not _differences(job, planned)


def _differences(job: Job, planned: Mapping[str, Any]) -> list[str]:
    """What the run in the folder has otherwise."""
    path = job.out / DONE / PLAN
    if not path.is_file():
        return ["files"] if job.out.is_dir() and any(job.out.glob("part-*")) else []
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        return [PLAN]
    return [key for key in planned if not isinstance(found, dict) or found.get(key) != planned[key]]


def begin(job: Job, planned: Mapping[str, Any]) -> list[int]:
    """Make the folder, or see that it is of the same run; returns the numbers of the shards that are not done."""
    other = _differences(job, planned)
    expected = "a new folder, or one of a run with the same input and options"
    require(not other, f"out {job.out}", expected, f"another {', '.join(other)}")
    write_json(job.out / DONE / PLAN, planned)
    count = -(-planned["rows"] // job.shard_size)
    return [number for number in range(count) if not _is_done(job, number)]


def _is_done(job: Job, number: int) -> bool:
    """Whether a shard is done and still there."""
    try:
        report = json.loads(job.done_file(number).read_text(encoding="utf-8"))
        return report["rows"] == 0 or (job.out / report["file"]).stat().st_size == report["bytes"]
    except (OSError, ValueError, KeyError, TypeError):
        return False


def run_shard(job: Job, rows: Rows, tokenizer: Any, number: int, step: Callable[[int], None]) -> dict[str, Any]:
    """Make one shard; returns the report that is also written."""
    numbers = range(number * job.shard_size, min(len(rows), (number + 1) * job.shard_size))
    found, failures, images, largest = rows.encode(tokenizer, numbers, job.how, step)
    path = job.out / job.file(number)
    report: dict[str, Any] = {"file": job.file(number), "first": numbers.start, "rows": len(found), "images": images}
    report |= {"bytes": 0, "sha256": "", "ids": sum(len(r.values) for _, r in found if isinstance(r, CodesOfImage))}
    if found:
        write_shard(path, found, tokenizer.family, largest)
        report |= {"bytes": path.stat().st_size, "sha256": _hash_file(path)}
    causes: dict[str, int] = {}
    for failure in failures:
        causes[failure.cause] = causes.get(failure.cause, 0) + 1
    report |= {"failures": len(failures), "causes": dict(sorted(causes.items()))}
    report["failed"] = [asdict(failure) for failure in failures[:SHOWN_FAILURES]]
    write_json(job.done_file(number), report)
    return report


def _hash_file(path: Path) -> str:
    found = sha256()
    with path.open("rb") as stream:
        while block := stream.read(1 << 20):
            found.update(block)
    return found.hexdigest()


def finish(job: Job, planned: Mapping[str, Any]) -> dict[str, Any]:
    """Write the manifest of a run whose shards are all done, and return it."""
    count = -(-planned["rows"] // job.shard_size)
    reports = [json.loads(job.done_file(number).read_text(encoding="utf-8")) for number in range(count)]
    causes: dict[str, int] = {}
    for report in reports:
        for cause, times in report["causes"].items():
            causes[cause] = causes.get(cause, 0) + times
    images, ids = (sum(report[key] for report in reports) for key in ("images", "ids"))
    totals = {
        "images": images,
        "ids": ids,
        "ids_per_image": round(ids / images, 3) if images else 0.0,
        "failures": sum(report["failures"] for report in reports),
        "failures_by_cause": dict(sorted(causes.items())),
    }
    shards = [{key: value for key, value in report.items() if key != "failed"} for report in reports]
    failed = [failure for report in reports for failure in report["failed"]]
    manifest = {**planned, **totals, "shards": shards, "failed": failed[:SHOWN_FAILURES]}
    write_json(job.out / MANIFEST, manifest)
    return manifest


def run_here(job: Job, rows: Rows, tokenizer: Any, numbers: Iterable[int], step: Callable[[int], None]) -> None:
    """Make shards in this process, one after the other."""
    for number in numbers:
        run_shard(job, rows, tokenizer, number, step)


_worker: list[Any] = []
"""In a worker process: the job, the input, the tokenizer, and the counter of finished rows."""


def _begin_worker(job: Job, counter: Any, parent: int, threads: int) -> None:
    import torch  # not in the parent's `--help`

    torch.set_num_threads(threads)
    threading.Thread(target=_end_with, args=(parent,), daemon=True).start()
    _worker[:] = [job, job.open_input(), job.load(), counter]


def _end_with(parent: int) -> None:
    """End this process soon after its parent: a killed parent cannot do that itself."""
    while os.getppid() == parent:
        time.sleep(0.5)
    os._exit(1)


def _worker_shard(number: int) -> int:
    job, rows, tokenizer, counter = _worker

    def step(count: int) -> None:
        with counter.get_lock():
            counter.value += count

    run_shard(job, rows, tokenizer, number, step)
    return number


def run_processes(job: Job, numbers: Sequence[int], workers: int, step: Callable[[int], None]) -> None:
    """Make shards in worker processes, each with its own tokenizer and an equal share of the threads."""
    context = get_context("spawn")
    counter, seen = context.Value("q", 0), 0
    threads = max(1, (os.cpu_count() or 1) // workers)
    arguments = (job, counter, os.getpid(), threads)
    with ProcessPoolExecutor(workers, context, _begin_worker, arguments) as pool:
        waiting = {pool.submit(_worker_shard, number) for number in numbers}
        try:
            while waiting:
                done, waiting = wait(waiting, timeout=0.5, return_when=FIRST_COMPLETED)
                for future in done:
                    future.result()
                now = counter.value
                step(now - seen)
                seen = now
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


class ShardBatch:
    """`{"shard": [numbers]}` -> `{"shard": ..., "rows": ..., "failures": ...}`: what Ray Data maps over.

    The shards are written where the job says, which all machines must reach.
    """

    def __init__(self, job: Job) -> None:
        self.job = job
        self._ready: tuple[Any, Any] | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_ready": None}

    def __call__(self, batch: Mapping[str, Any]) -> dict[str, list[int]]:
        if self._ready is None:
            self._ready = self.job.open_input(), self.job.load()
        rows, tokenizer = self._ready
        numbers = [int(number) for number in batch["shard"]]
        reports = [run_shard(self.job, rows, tokenizer, number, lambda _: None) for number in numbers]
        return {"shard": numbers, **{key: [report[key] for report in reports] for key in ("rows", "failures")}}


def run_ray(job: Job, numbers: Sequence[int], workers: int, step: Callable[[int], None]) -> None:
    """Make shards through Ray Data, on the cluster that Ray finds or on this machine.

    workers: the most actors at a time, of one CPU each. The work begins with the first that finds one: a pool of a
    fixed size would wait for CPUs that the cluster does not have.
    """
    try:
        import ray.data  # pyright: ignore[reportMissingImports]
    except ImportError:
        fail("engine", "ray to be installed (pip install 'tokenizers_mm[ray]')", "no such package")
    items = ray.data.from_items([{"shard": number} for number in numbers])
    pool = ray.data.ActorPoolStrategy(min_size=1, max_size=workers)
    done = items.map_batches(ShardBatch, fn_constructor_args=(job,), batch_size=1, compute=pool, batch_format="numpy")
    for row in done.iter_rows():
        step(min(job.shard_size, int(row["rows"]) + int(row["failures"])))


def forget(job: Job) -> None:
    """Remove the folder of a run."""
    shutil.rmtree(job.out, ignore_errors=True)
