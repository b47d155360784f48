"""Engines that make the shards of a run: this process, worker processes of this machine, Ray Data on many."""

import os
import signal
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from multiprocessing import get_context
from typing import Any

from tokenizers_mm._check import fail
from tokenizers_mm.data.tokenizing import Job, Rows, run_shard


def run_here(job: Job, rows: Rows, tokenizer: Any, numbers: Iterable[int], step: Callable[[int], None]) -> None:
    """Make shards in this process, one after the other."""
    for number in numbers:
        run_shard(job, rows, tokenizer, number, step)


STOPPED = -(1 << 62)
"""Value of the counter of finished rows at which worker processes end."""

_worker: list[Any] = []
"""In a worker process: the job, the input, the tokenizer, and the counter of finished rows."""


def _begin_worker(job: Job, counter: Any, parent: int, threads: int) -> None:
    import torch  # not in the parent's `--help`

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # an interrupt from the keyboard reaches all: the parent says it
    torch.set_num_threads(threads)
    threading.Thread(target=_end_with, args=(parent, counter), daemon=True).start()
    _worker[:] = [job, job.open_input(), job.load(), counter]


def _end_with(parent: int, counter: Any) -> None:
    """End this process soon after its parent, which cannot do that itself when it is killed, or when it says so."""
    while os.getppid() == parent and counter.value >= 0:
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
            if waiting:
                counter.value = STOPPED
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
        return {"shard": numbers, **{key: [getattr(report, key) for report in reports] for key in ("rows", "failures")}}


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
