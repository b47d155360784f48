"""Duration of the demo on this machine: a few steps are timed, the rest is counted in steps."""

import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass, field

KNOWN = 0.1
"""Share of a phase from which its own pace is known."""


@dataclass
class Clock:
    """Phases of the work in order, with the seconds that each is expected to take.

    Once phases are over, the rest is expected to be as much slower or faster than predicted as they were.
    """

    expected: Mapping[str, float]
    spent: dict[str, float] = field(default_factory=dict)
    _phase: str = ""
    _started: float = field(default_factory=time.perf_counter)
    _told: float = 0.0

    def begin(self, phase: str) -> None:
        """Say which phase begins, and how long the rest takes."""
        self.end()
        self._phase, self._started = phase, time.perf_counter()
        number = list(self.expected).index(phase) + 1
        print(f"[{number}/{len(self.expected)}] {phase}; {in_words(self.left())} left", file=sys.stderr, flush=True)

    def end(self) -> None:
        """The present phase is over."""
        if self._phase:
            self.spent[self._phase] = time.perf_counter() - self._started
        self._phase = ""

    def left(self, done: float = 0.0) -> float:
        """Seconds that the whole still takes, when a share `done` of the present phase is done."""
        predicted = sum(self.expected[phase] for phase in self.spent)
        pace = sum(self.spent.values()) / predicted if predicted else 1.0
        ahead = sum(s for phase, s in self.expected.items() if phase not in self.spent and phase != self._phase)
        mine = self.expected.get(self._phase, 0.0) * pace
        if done > KNOWN:
            mine = (time.perf_counter() - self._started) / done
        return pace * ahead + mine * (1 - done)

    def tick(self, done: float) -> None:
        """Say how far the present phase is and how long the whole still takes, every ten seconds."""
        now = time.perf_counter()
        if now - self._told >= 10.0:
            self._told = now
            print(f"    {done:4.0%}, {in_words(self.left(done))} left in all", file=sys.stderr, flush=True)


def in_words(seconds: float) -> str:
    """Seconds as a person says them."""
    return f"{seconds:.0f} seconds" if seconds < 100 else f"{seconds / 60:.0f} minutes"
