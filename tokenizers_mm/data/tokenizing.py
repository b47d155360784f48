"""From a set of images to shards of ids: resumable, the same bytes however often it was interrupted, on any engine.

The input is cut into ranges of `shard_size` rows, and a range becomes a shard. A shard is written in one move, and then
a small file that says it is done; a run that finds that file goes on with the next shard. Everything in a shard follows
from the input, the tokenizer and the options (with stable ids), so that a shard that was lost is made again as it was.
"""

import os
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from shutil import rmtree
from typing import Annotated, Any, Protocol

from PIL import Image

from tokenizers_mm._check import fail, printable, require, shorten
from tokenizers_mm._files import STAGING, one_writer, regular_file, sha256, write_json
from tokenizers_mm._images import Fit, decode_image
from tokenizers_mm._origin import origin_facts
from tokenizers_mm.config import Pattern, Range, from_mapping, read_json
from tokenizers_mm.data.codes import CodesOfImage
from tokenizers_mm.data.image_sets import ImageSet
from tokenizers_mm.data.token_shards import DONE, MANIFEST, SHARD_ENDINGS, Row, write_shard
from tokenizers_mm.types import ImageCodes, Stream

PLAN = "plan.json"
"""File that says what the run in a folder is."""

MAX_REPORT = 64 << 20
"""Limit of the bytes of a shard's report."""

SHOWN_FAILURES = 1000
"""Failures of a shard that are kept one by one; those after them are only counted, by cause."""

Count = Annotated[int, Range(0)]


@dataclass(frozen=True)
class Encoding:
    """Settings for turning images into codes. See `ImageTokenizer.encode_batches`; strict: a failure ends the run."""

    fit: Fit = "refuse"
    stable: bool = True
    batch_size: int | None = None
    read_ahead: int = 1
    strict: bool = False


@dataclass(frozen=True)
class Failure:
    """A row that could not be encoded: its number, its name, and the sentence that says why."""

    row: Count
    name: str
    reason: str

    @classmethod
    def of(cls, row: int, name: str, error: ValueError) -> "Failure":
        """The failure of a row, in printable text."""
        return cls(row, printable(name), shorten(readable(str(error)), 500))

    @property
    def cause(self) -> str:
        """Expectation that was not met: the same words for failures of one kind."""
        return self.reason.partition(": expected ")[2].rpartition(", got ")[0][:200] or "something else"


@dataclass(frozen=True)
class ShardReport:
    """Facts about a finished shard: its rows (from `first` on), its file (bytes 0: there is none), and failures.

    failures: all of them, `causes` by what was expected; `failed` the first ones.
    """

    file: str
    first: Count
    rows: Count
    images: Count
    bytes: Count
    sha256: Annotated[str, Pattern("|[0-9a-f]{64}", "a SHA-256")]
    ids: Count
    failures: Count
    causes: dict[str, Count]
    failed: tuple[Failure, ...]


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
            failures.append(Failure.of(numbers[index], names.pop(numbers[index]), error))
            step(1)

        def pair(number: int) -> tuple[str, Callable[[], Image.Image]]:
            names[number] = readable(self.images.name(number))
            return f"image {names[number]}", opener(number)

        found: dict[int, Row] = {}
        largest = 0
        for indices, codes in encode_pairs(tokenizer, map(pair, numbers), how, refused):
            largest = max(largest, largest_id(codes))
            here = [numbers[index] for index in indices]
            texts = [(names.pop(number), captions.pop(number, "")) for number in here]
            found.update(zip(here, CodesOfImage.each(codes, texts), strict=True))
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
    return largest_of(codes.streams) if isinstance(codes, ImageCodes) else 0


def largest_of(streams: Sequence[Stream]) -> int:
    """The largest id of some streams; 0 for none."""
    return max((stream.codebook_size for stream in streams), default=1) - 1


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
    """Input that `encode_batches` opens: an image, a path, or a function."""
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


def plan(job: Job, rows: Rows, tokenizer: Any) -> dict[str, Any]:
    """Values that decide the bytes of the shards: those that a run that goes on must have in common with the first."""
    how = asdict(job.how)
    kept = {"fit": how["fit"], "stable": how["stable"]}
    if not job.how.stable:
        kept["batch_size"] = how["batch_size"]
    return {
        "library": "tokenizers_mm",
        "format": job.format,
        **origin_facts(tokenizer.fingerprint()),
        "dtype": str(tokenizer.dtype).removeprefix("torch."),
        "input": rows.fingerprint(),
        "rows": len(rows),
        "shard_size": job.shard_size,
        "encoding": kept,
    }


def _differences(job: Job, planned: Mapping[str, Any]) -> list[str]:
    """Values that the run in the folder has otherwise, by name; short ones with what they are there."""
    path = job.out / DONE / PLAN
    if not path.is_file():
        return ["files"] if job.out.is_dir() and any(job.out.glob("part-*")) else []
    try:
        found = read_json(path)
    except ValueError:
        return [PLAN]
    texts = []
    for key, value in {**planned, **planned.get("encoding", {})}.items():
        inner = found.get("encoding")
        other = (inner.get(key) if isinstance(inner, dict) else None) if key not in planned else found.get(key)
        if other != value and key != "encoding":
            shown = isinstance(other, (str, int)) and len(str(other)) < 20
            texts.append(f"{key} ({other})" if shown else key)
    return texts


def _refuse_other(job: Job, planned: Mapping[str, Any]) -> None:
    """Refuse a folder with other files, or with a run of another plan."""
    other = _differences(job, planned)
    expected = "a new folder, or one of a run with the same input and options"
    require(not other, f"out {job.out}", expected, f"another {', '.join(other)}")


@contextmanager
def begun(job: Job, planned: Mapping[str, Any], anew: bool = False) -> Iterator[list[int]]:
    """The folder of a run for this process alone: made, or seen to be of the same run; the shards that are not done.

    anew: what another run left in the folder is removed; by default it is refused.

    Raises:
        ValueError: another run, or another process that writes to the folder.
    """
    if not anew:
        _refuse_other(job, planned)
    with one_writer(job.out / DONE, f"out {job.out}", str(job.out)):
        if anew and _differences(job, planned):
            forget(job)
        _refuse_other(job, planned)
        write_json(job.out / DONE / PLAN, planned)
        count = -(-planned["rows"] // job.shard_size)
        yield [number for number in range(count) if finished(job, number) is None]
    if not (job.out / DONE / PLAN).exists():
        with suppress(OSError):  # not empty
            (job.out / DONE).rmdir()
            job.out.rmdir()


def finished(job: Job, number: int, hashed: bool = True) -> ShardReport | None:
    """The report of a shard that is done and still whole; None for any other, whatever stands in its place.

    hashed: whether all bytes of the shard are compared, or only how many there are.
    """
    place = job.done_file(number)
    try:
        report = from_mapping(ShardReport, read_json(place, MAX_REPORT), str(place))
        ours = (report.file, report.first) == (job.file(number), number * job.shard_size)
        if not ours or (report.bytes > 0) != (report.rows > 0):
            return None
        path = regular_file(job.out / report.file) if report.bytes else None
        same = path is None or path.stat().st_size == report.bytes
        return report if same and (path is None or not hashed or sha256(path) == report.sha256) else None
    except (OSError, ValueError):
        return None


def run_shard(job: Job, rows: Rows, tokenizer: Any, number: int, step: Callable[[int], None]) -> ShardReport:
    """Make one shard; returns the report that is also written."""
    numbers = range(number * job.shard_size, min(len(rows), (number + 1) * job.shard_size))
    found, failures, images, largest = rows.encode(tokenizer, numbers, job.how, step)
    path, size, digest = job.out / job.file(number), 0, ""
    if found:
        write_shard(path, found, tokenizer.fingerprint(), largest)
        size, digest = path.stat().st_size, sha256(path)
    ids = sum(len(row.values) for _, row in found if isinstance(row, CodesOfImage))
    causes = dict(sorted(Counter(failure.cause for failure in failures).items()))
    report = ShardReport(
        *(path.name, numbers.start, len(found), images, size, digest, ids, len(failures), causes),
        tuple(failures[:SHOWN_FAILURES]),
    )
    write_json(job.done_file(number), asdict(report))
    return report


def finish(job: Job, planned: Mapping[str, Any]) -> dict[str, Any]:
    """Write the manifest of a run whose shards are all done, and return it."""
    reports: list[ShardReport] = []
    for number in range(-(-planned["rows"] // job.shard_size)):
        report = finished(job, number, hashed=False)
        if report is None:
            fail(str(job.out / job.file(number)), "the shard that was written", "another file (start again)")
        reports.append(report)
    causes: Counter[str] = sum((Counter(report.causes) for report in reports), Counter())
    images, ids = sum(report.images for report in reports), sum(report.ids for report in reports)
    totals = {
        "images": images,
        "ids": ids,
        "ids_per_image": round(ids / images, 3) if images else 0.0,
        "failures": sum(report.failures for report in reports),
        "failures_by_cause": dict(sorted(causes.items())),
    }
    shards = [asdict(replace(report, failed=())) for report in reports]
    for shard in shards:
        del shard["failed"]
    failed = [asdict(failure) for report in reports for failure in report.failed]
    manifest = {**planned, **totals, "shards": shards, "failed": failed[:SHOWN_FAILURES]}
    write_json(job.out / MANIFEST, manifest)
    return manifest


def forget(job: Job) -> None:
    """Remove all files of a run but its lock, which is held; `begun` removes the folder where nothing is left."""
    for path in [*job.out.glob("part-*"), job.out / MANIFEST, *(job.out / DONE).glob("*.json")]:
        path.unlink(missing_ok=True)
    for leftover in [*job.out.glob(f".*{STAGING}"), *(job.out / DONE).glob(f".*{STAGING}")]:  # of writers that died
        rmtree(leftover)
