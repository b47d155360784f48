"""Early signs of a training that goes wrong, found in the lines of its log, each with advice."""

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping
from statistics import fmean
from typing import Any

SPAN = 10
"""Lines of the log that are compared with those before them."""

QUIET = 50
"""Lines after a report in which the same sign is not reported again."""

REVIVE = "revive unused codes (revival.every), weigh the entropy term, or lower the learning rate"
BALANCE = "lower weights.generator or the discriminator's learning rate, or add lecam or r1"


class Signs:
    """A reader of the log; the same lines lead to the same reports, however often a run was resumed."""

    def __init__(self, lines: Iterable[Mapping[str, Any]] = ()) -> None:
        """lines: those of the log so far."""
        self._series: dict[str, list[float]] = defaultdict(list)
        self._reported: dict[str, int] = {}
        for line in lines:
            self.look(line)

    def look(self, line: Mapping[str, Any]) -> list[str]:
        """Sentences about what a new line shows, most often none."""
        found = []
        for name, value in line.items():
            if isinstance(value, (int, float)) and math.isfinite(value):
                series = self._series[name]
                series.append(float(value))
                sentence = _sign(name, series)
                if sentence and len(series) > self._reported.get(name, -QUIET) + QUIET:
                    self._reported[name] = len(series)
                    found.append(f"{name}: {sentence}")
        return found


def _sign(name: str, series: list[float]) -> str:
    """Sign that a series shows at its end, "" for none."""
    if len(series) < 2 * SPAN:
        return ""
    now, before = fmean(series[-SPAN:]), fmean(series[-2 * SPAN : -SPAN])
    best = max(fmean(series[i : i + SPAN]) for i in range(0, len(series) - SPAN + 1, SPAN))
    if name.startswith(("usage_", "perplexity_")) and now < 0.5 * best:
        return f"fell from {best:.3g} to {now:.3g}, codes are dying; {REVIVE}"
    if name == "psnr" and now < before - 1.0:
        return f"fell by {before - now:.1f} dB; lower the learning rate, or the weights of terms other than pixel"
    if name == "psnr" and abs(now - before) < 0.02 and best < now + 0.1 and len(series) >= 4 * SPAN:
        return f"has stopped rising at {now:.1f} dB; raise the learning rate, or the size of model or codebook"
    if name == "discriminator" and now < 0.02 * max(best, 1e-9):
        return f"the discriminator tells everything apart (loss {now:.2g}), the tokenizer learns little; {BALANCE}"
    if name == "grad_norm" and now > 30 * max(before, 1e-9):
        return f"rose from {before:.3g} to {now:.3g}; lower the learning rate, or add warmup"
    return ""
