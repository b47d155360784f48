"""One pass over images for any number of candidates, in flat memory, which can be interrupted and goes on.

Every batch is prepared once and goes through all candidates; metrics take it and keep sums or one number per image.
"""

import copy
import hashlib
import json
import math
import resource
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from tokenizers_mm._check import expecting, fail, naming, require
from tokenizers_mm._files import atomic_path, regular_file
from tokenizers_mm.eval.base import Batch, Metric, PerImage, Setup
from tokenizers_mm.eval.candidates import Candidate, CodecCandidate, Encoded
from tokenizers_mm.eval.images import ImageSource, Loaded, ahead, batches
from tokenizers_mm.eval.metrics import METRICS
from tokenizers_mm.eval.protocols import Protocol
from tokenizers_mm.models.base import BATCH_PIXELS

PARTIAL = "partial.safetensors"
"""File in the folder of a report with the state of an unfinished run."""

SAVE_EVERY = 20.0
"""Seconds between two saves of the state, times the seconds that one takes where these are more than one."""

VERSION = 3
"""Raised when a metric changes its values: states of other versions are not continued."""


@dataclass
class Measured:
    """A candidate, its metrics, and what was left out and why.

    seconds: of encoding and decoding, without the first batch. timed: images of these. over: images whose bits exceed
    those that a codec was to match.
    """

    candidate: Candidate
    metrics: dict[str, Metric]
    missing: dict[str, str]
    seconds: list[float] = field(default_factory=lambda: [0.0, 0.0])
    timed: int = 0
    over: int = 0


@dataclass
class Run:
    """An evaluation: source, protocol, setup, candidates with their metrics, and how far it is.

    threads: for networks. All else computes with the values of one image, where several threads take longer than one.
    """

    source: ImageSource
    setup: Setup
    measured: list[Measured]
    size: tuple[int, int] | None
    multiple: int
    used: list[int] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)
    digest: str = ""
    next: int = 0
    seconds: float = 0.0
    threads: int = field(default_factory=torch.get_num_threads)

    @property
    def protocol(self) -> Protocol:
        return self.setup.protocol

    @property
    def key(self) -> str:
        """Hash of all that the state depends on."""
        facts = {
            "version": VERSION,
            "protocol": self.protocol.hash,
            "size": self.size,
            "images": [self.source.place, self.source.names, self.source.marks],
            "candidates": [[m.candidate.name, m.candidate.identity, sorted(m.metrics)] for m in self.measured],
            "weights": dict(self.setup.weights),
            "classes": list(self.setup.classes),
            "extractor": self.setup.extractor,
        }
        return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()

    def prepare(self, image: Image.Image, name: str) -> Image.Image:
        """An image as candidates get it; ValueError, with its name, where it has another size than they take."""
        with naming(f"image {name}"):
            found = self.protocol.prepare(image, self.size, self.multiple)
        ok = found.height % self.multiple == 0 and found.width % self.multiple == 0
        require(ok, f"image {name}", f"sides that are multiples of {self.multiple}", f"{found.height} x {found.width}")
        return found


def common_size(candidates: Sequence[Candidate], protocol: Protocol) -> tuple[tuple[int, int] | None, int]:
    """(height, width) that all candidates get, None for each image's own, and the multiple that sides must have."""
    fixed = [candidate for candidate in candidates if candidate.image_size is not None]
    flexible = [candidate for candidate in candidates if candidate.image_size is None]
    multiple = math.lcm(*(candidate.size_multiple for candidate in flexible))
    own = fixed[0].image_size if fixed else None
    size = (protocol.size, protocol.size) if protocol.size else own
    if size is None:
        require(protocol.fit != "adm", f"protocol {protocol.name}", "a size for the crop of ADM (--size)", "none")
        return None, multiple
    for candidate in fixed:
        same = candidate.image_size == size or protocol.other_size == "bicubic"
        what = "{} x {}".format(*(candidate.image_size or ()))
        require(
            same, f"protocol {protocol.name}", f"{what} pixels, which {candidate.name} takes", f"{size[0]} x {size[1]}"
        )
    fits = size[0] % multiple == 0 and size[1] % multiple == 0
    require(fits, f"protocol {protocol.name}", f"a size that is a multiple of {multiple}", f"{size[0]} x {size[1]}")
    return size, multiple


def begin(
    candidates: Sequence[Candidate],
    source: ImageSource,
    setup: Setup,
    names: Sequence[str] | None = None,
    strict: bool = True,
) -> Run:
    """A run that has not begun. names: of metrics; None takes those by default that can be measured here.

    strict: a metric that was asked for and cannot be measured is an error; otherwise it is left out, with the reason.

    Raises:
        ValueError: a metric that was asked for cannot be measured, or the candidates take no common size.
    """
    require(len(candidates) > 0, "tokenizers", "at least one", "none")
    for name in names or ():
        require(name in METRICS, "metrics", f"one of {', '.join(METRICS)}", name)
    size, multiple = common_size(candidates, setup.protocol)
    setup = replace(setup, classes=tuple(source.classes))
    wanted = list(names) if names is not None else [name for name, cls in METRICS.items() if cls.default]
    measured = []
    for candidate in candidates:
        found, missing = {}, {}
        for name in METRICS:
            if name not in wanted:
                continue
            if METRICS[name].reads_features and not candidate.has_features:
                missing[name] = f"{name}: expected {METRICS[name].needs}, got {candidate.name}"
                continue
            try:
                metric = METRICS[name](setup)
            except (ValueError, ImportError) as error:
                if names is not None and strict:
                    raise
                missing[name] = str(error)
                continue
            if metric.reads_semantic and not candidate.has_semantic:
                missing[name] = f"{name}: expected a tokenizer with a semantic decoder, got {candidate.name}"
                continue
            found[name] = metric
        measured.append(Measured(candidate, found, missing))
    return Run(source, setup, measured, size, multiple)


def carry_out(
    run: Run,
    out: Path | None = None,
    progress: Callable[[int, int], None] | None = None,
    save_every: float = SAVE_EVERY,
) -> Run:
    """Go through the images. out: folder for the state of an unfinished run, which is continued if it is of this run.

    progress: called with the images done and all of them. What is lost by an interrupt is the work since the last save.
    """
    partial = None if out is None else out / PARTIAL
    if partial is not None:
        restore(run, partial)
    saved, cost, start = time.monotonic(), 0.0, time.monotonic() - run.seconds
    pixels = min(BATCH_PIXELS.get(m.candidate.device.type, BATCH_PIXELS["cuda"]) for m in run.measured)
    with using_threads(1):
        for loaded in ahead(batches(run.source, run.prepare, pixels, run.next)):
            if loaded.indices:
                _measure(run, loaded)
            for image in loaded.levels:
                digest = hashlib.sha256(run.digest.encode())
                digest.update(image)
                run.digest = digest.hexdigest()
            run.next = loaded.following
            run.used += loaded.indices
            run.skipped += loaded.skipped
            run.seconds = time.monotonic() - start
            if progress is not None:
                progress(run.next, len(run.source))
            if partial is not None and time.monotonic() - saved > save_every * max(1.0, cost):
                begun = time.monotonic()
                save(run, partial)
                saved = time.monotonic()
                cost = saved - begun
    if not run.used:
        fail("images", "at least one that can be used", f"none ({len(run.skipped)} refused; {run.skipped[:1]})")
    return run


def _measure(run: Run, loaded: Loaded) -> None:
    """One batch through all candidates and their metrics."""
    shared: dict[str, Any] = {}
    x, labels = loaded.images, [run.source.labels[index] for index in loaded.indices]
    for measured, (made, encoded, seconds, over) in zip(run.measured, reconstructions(run, x), strict=True):
        measured.over += over
        if run.used:  # the first batch warms up
            measured.seconds = [a + b for a, b in zip(measured.seconds, seconds, strict=True)]
            measured.timed += len(x)
        candidate = measured.candidate
        metrics, taken = measured.metrics.values(), _resized(x, candidate.image_size)
        with using_threads(run.threads):
            features = candidate.features(taken) if any(metric.reads_features for metric in metrics) else None
            semantic = candidate.semantic(taken) if any(metric.reads_semantic for metric in metrics) else None
        batch = Batch(x, made, encoded.ids, encoded.bits, features, labels, loaded.captions, semantic, shared)
        for metric in metrics:
            with using_threads(1 if metric.small else run.threads):
                metric.update(batch)


@contextmanager
def using_threads(count: int) -> Iterator[None]:
    """So many threads for the operations of the block, and for threads that begin in it."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def reconstructions(run: Run, x: Tensor) -> Iterator[tuple[Tensor, Encoded, tuple[float, float], int]]:
    """Results of every candidate for a batch, in order: see `reconstruct`, and images above the bits to be matched.

    Codecs match the first candidate that is none.
    """
    target: Sequence[float] | None = None
    codecs = [m.candidate for m in run.measured if isinstance(m.candidate, CodecCandidate)]
    first = next((m.candidate for m in run.measured if m.candidate not in codecs), None)
    if run.measured[0].candidate is not first and first is not None and any(codec.matches for codec in codecs):
        target = reconstruct(run, first, x, None)[1].bits
    for measured in run.measured:
        candidate = measured.candidate
        made, encoded, seconds = reconstruct(run, candidate, x, target)
        if candidate is first:
            target = encoded.bits
        over = 0
        if candidate in codecs and candidate.matches and target is not None:  # type: ignore[attr-defined]
            over = sum(bits > wanted for bits, wanted in zip(encoded.bits, target, strict=True))
        yield made, encoded, seconds, over


def reconstruct(
    run: Run, candidate: Candidate, x: Tensor, target: Sequence[float] | None
) -> tuple[Tensor, Encoded, tuple[float, float]]:
    """Reconstructions as the protocol finishes them, the codes, and the seconds of encoding and decoding."""
    times, name = [_now(candidate)], f"reconstruction by {candidate.name}"
    with using_threads(1 if isinstance(candidate, CodecCandidate) else run.threads):
        encoded = candidate.encode(_resized(x, candidate.image_size), target)
        times.append(_now(candidate))
        made = candidate.decode(encoded)
        times.append(_now(candidate))
        made = run.protocol.finish(_resized(made, (x.shape[-2], x.shape[-1])), name)
    require(made.shape == x.shape, name, f"{list(x.shape)}", made)
    return made, encoded, (times[1] - times[0], times[2] - times[1])


def _resized(x: Tensor, size: tuple[int, int] | None) -> Tensor:
    """Images scaled (bicubic, antialiased) where a candidate takes only another size, which the protocol allowed."""
    if size is None or tuple(x.shape[-2:]) == size:
        return x
    return torch.nn.functional.interpolate(x, size, mode="bicubic", antialias=True).clamp(-1, 1)


def _now(candidate: Candidate) -> float:
    if candidate.device.type == "cuda":
        torch.cuda.synchronize(candidate.device)
    return time.perf_counter()


def peak_memory(device: torch.device) -> int:
    """Bytes: the most that torch held on a CUDA device, or the largest resident size of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def save(run: Run, path: Path) -> None:
    """Write the state of a run, atomically."""
    tensors = {}
    for number, measured in enumerate(run.measured):
        for name, metric in measured.metrics.items():
            tensors |= {f"{number}|{name}|{key}": t.contiguous() for key, t in metric.state().items()}
    facts = {
        "used": run.used,
        "skipped": run.skipped,
        "digest": run.digest,
        "next": run.next,
        "seconds": run.seconds,
        "measured": [[m.seconds, m.timed, m.over] for m in run.measured],
    }
    text = json.dumps(facts)
    with atomic_path(path) as temporary:
        save_file(tensors, temporary, metadata={"key": run.key, "facts": text, "sha256": _digest(text, tensors)})


def restore(run: Run, path: Path) -> bool:
    """Take the state of a file, if there is one, whole and of this run; False where the run begins anew."""
    try:
        with safe_open(regular_file(path), framework="pt") as file:
            metadata = file.metadata() or {}
            if metadata.get("key") != run.key:
                return False
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
        text = metadata.get("facts", "")
        if metadata.get("sha256") != _digest(text, tensors):
            return False
        facts = _checked_facts(json.loads(text), run)
        found = [_restored(tensors, number, measured) for number, measured in enumerate(run.measured)]
        for metric in (metric for metrics in found for metric in metrics.values() if isinstance(metric, PerImage)):
            require(len(metric.values) == len(facts["used"]), "state", "a value per image", len(metric.values))
    except (OSError, SafetensorError, ValueError, RecursionError):
        return False
    for measured, metrics, (seconds, timed, over) in zip(run.measured, found, facts["measured"], strict=True):
        measured.metrics, measured.seconds, measured.timed, measured.over = metrics, seconds, timed, over
    run.used, run.skipped, run.digest = facts["used"], facts["skipped"], facts["digest"]
    run.next, run.seconds = facts["next"], facts["seconds"]
    return True


def _restored(tensors: Mapping[str, Tensor], number: int, measured: Measured) -> dict[str, Metric]:
    """Copies of a candidate's metrics with the state of a file."""
    found = {}
    for name, metric in measured.metrics.items():
        start = f"{number}|{name}|"
        found[name] = copy.copy(metric)
        with expecting("state", f"one of the metric {name}", RuntimeError):
            found[name].restore({key.removeprefix(start): t for key, t in tensors.items() if key.startswith(start)})
    return found


def _digest(facts: str, tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 of all that a state holds."""
    found = hashlib.sha256(facts.encode())
    for name, tensor in sorted(tensors.items()):
        found.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        found.update(tensor.contiguous().flatten().view(torch.uint8).numpy().data)
    return found.hexdigest()


def _checked_facts(facts: Any, run: Run) -> dict[str, Any]:
    """Facts that a state holds beside its tensors; ValueError where it is not of these images and candidates."""
    require(isinstance(facts, dict), "state", "a mapping", facts)
    used, skipped, following, measured = (facts.get(key) for key in ("used", "skipped", "next", "measured"))
    sound = type(following) is int and 0 <= following <= len(run.source)
    sound = sound and isinstance(used, list) and isinstance(skipped, list) and len(used) + len(skipped) == following
    sound = sound and all(type(index) is int and 0 <= index < following for index in used)
    sound = sound and used == sorted(set(used)) and all(isinstance(reason, str) for reason in skipped)
    sound = sound and isinstance(facts.get("digest"), str) and _is_seconds(facts.get("seconds"))
    require(sound, "state", "images of this run", "others")
    sound = isinstance(measured, list) and len(measured) == len(run.measured)
    for item in measured if sound else ():
        sound = sound and isinstance(item, list) and len(item) == 3 and isinstance(item[0], list) and len(item[0]) == 2
        sound = sound and all(map(_is_seconds, item[0])) and all(type(n) is int and n >= 0 for n in item[1:])
    require(sound, "state", "times of the candidates of this run", "others")
    return facts


def _is_seconds(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value) and value >= 0
