"""Signals end a run after the step that it is in."""

import signal
import threading
from types import FrameType


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
