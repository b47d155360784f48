"""A progress line on stderr: how much is done, how fast, and the time left."""

import sys
import time
from types import TracebackType


class Progress:
    """Rows of a run. On a terminal the line is renewed in place; elsewhere a new one is written now and then."""

    def __init__(self, total: int, done: int = 0, unit: str = "images", every: float | None = None) -> None:
        """total: rows of the whole run. done: rows of an earlier run. every: seconds between two lines."""
        self.total, self.begun, self.done, self.unit = total, done, done, unit
        self.terminal = sys.stderr.isatty()
        self.every = (0.2 if self.terminal else 30.0) if every is None else every
        self.start = self.last = time.monotonic()
        self.shown = False

    def __call__(self, count: int) -> None:
        """Count rows that are done."""
        self.done += count
        if time.monotonic() - self.last >= self.every:
            self.show()

    def show(self) -> None:
        """Write the line."""
        self.last = time.monotonic()
        text = self.line(self.last - self.start)
        print(
            f"\r\x1b[K{text}" if self.terminal else text, end="" if self.terminal else "\n", file=sys.stderr, flush=True
        )
        self.shown = True

    def line(self, seconds: float) -> str:
        """The line after some seconds, for example `1200 / 5000 images (24 %), 310 images/s, 0:12 left`."""
        rate = (self.done - self.begun) / seconds if seconds > 0 else 0.0
        text = f"{self.done} / {self.total} {self.unit} ({100 * self.done // max(self.total, 1)} %)"
        if rate > 0:
            text += f", {rate:.3g} {self.unit}/s, {duration((self.total - self.done) / rate)} left"
        return text

    def note(self, text: str) -> None:
        """Write a line of another kind, without breaking the progress line."""
        print(f"\r\x1b[K{text}" if self.terminal and self.shown else text, file=sys.stderr, flush=True)

    def __enter__(self) -> "Progress":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.terminal and self.shown:
            self.show()
            print(file=sys.stderr)


def duration(seconds: float) -> str:
    """Hours, minutes and seconds, for example `0:07` or `2:05:00`."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
