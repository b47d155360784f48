"""The folder of a run belongs to one process at a time, and a signal ends the run after the step it is in."""

import fcntl
import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

from tokenizers_mm._check import fail

LOCK = ".lock"


@contextmanager
def locked(out: str) -> Iterator[None]:
    """Hold the folder's lock; ValueError where another process holds it.

    The system releases the lock of a process that died, so a stale one is taken over.
    """
    folder = Path(out)
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / LOCK, "a+", encoding="utf-8") as stream:
        try:
            fcntl.lockf(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)  # not inherited by worker processes
        except OSError:
            stream.seek(0)
            fail("config.out", "a folder that no other run writes to", f"{out} (process {stream.read().strip()})")
        stream.truncate(0)
        stream.write(f"{os.getpid()}\n")
        stream.flush()
        yield


class Signals:
    """Remembers SIGINT or SIGTERM while the block runs; a second one acts at once."""

    def __init__(self) -> None:
        self.received = 0
        self._before: dict[int, object] = {}

    def __enter__(self) -> "Signals":
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._take) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)  # type: ignore[arg-type]
        self._before = {}

    def _take(self, number: int, _: FrameType | None) -> None:
        self.received = number
        self.__exit__()
