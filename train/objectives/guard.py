"""The guard of joint tuning: measures reconstruction, remembers the last good weights, says when a bound is crossed."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from torch import Tensor

from tokenizers_mm.config import Range
from tokenizers_mm.eval.validation import measure


@dataclass(frozen=True)
class GuardConfig:
    """Watch over the reconstruction of fixed held-out pictures while the tokenizer learns with the language model.

    every: steps between looks; the end of a joint stage is always looked at. folder: of pictures, by default rendered
    scenes that no training sees. pictures: how many. max_psnr_drop: dB below the mean PSNR before the first joint
    stage. max_fid_ratio: of rFID to the rFID before, measured where `inception` names torch-fidelity's weights file.
    action: beyond a bound "stop" ends the run with all three parts as they last were within the bounds, "freeze" takes
    the tokenizer back to there and goes on with the others.
    """

    every: Annotated[int, Range(1)] = 500
    folder: str = ""
    pictures: Annotated[int, Range(1)] = 64
    max_psnr_drop: Annotated[float, Range(0, low_open=True)] = 1.0
    max_fid_ratio: Annotated[float, Range(1, low_open=True)] = 1.6
    inception: str = ""
    action: Literal["stop", "freeze"] = "stop"


class Guard:
    """Looks at the tokenizer, and keeps copies of the parts as they were at the last look within the bounds.

    before: PSNR (dB) and, where it is measured, rFID before the first joint stage. good_step: of the copies. crossed:
    the sentence that says which bound was crossed, "" as long as none was.
    """

    def __init__(self, config: GuardConfig, pictures: Tensor) -> None:
        self.config, self.pictures = config, pictures
        self.before: dict[str, float] = {}
        self.good: dict[str, dict[str, Tensor]] = {}
        self.good_step = 0
        self.crossed = ""

    @property
    def frozen(self) -> bool:
        """True if the tokenizer learns no more."""
        return bool(self.crossed)

    @property
    def stopped(self) -> bool:
        """True if the run is over."""
        return self.frozen and self.config.action == "stop"

    def measure(self, parts: Mapping[str, Any], step: int) -> dict[str, Any]:
        """Measure, compare, and copy the parts or take them back; returns a line for the log.

        parts: the networks by name, "tokenizer" among them. With action "freeze" only the tokenizer is copied.
        """
        found = measure(parts["tokenizer"], self.pictures, self.config.inception)
        first = not self.before
        self.before = self.before or found
        drop = self.before["psnr"] - found["psnr"]
        line: dict[str, Any] = {"guard": "before" if first else "within", "guard_psnr": found["psnr"]}
        line |= {"guard_psnr_drop": drop, "guard_rfid": found.get("rfid")}
        if "rfid" not in found:
            line["guard_rfid_missing"] = "rFID was not measured: guard.inception names no weights file"
        if drop > self.config.max_psnr_drop:
            self.crossed = f"PSNR fell by {drop:.2f} dB (bound {self.config.max_psnr_drop:g})"
        elif found.get("rfid", 0.0) > self.config.max_fid_ratio * self.before.get("rfid", 0.0):
            ratio = found["rfid"] / self.before["rfid"] if self.before["rfid"] else float("inf")
            self.crossed = f"rFID rose {ratio:.2f}-fold (bound {self.config.max_fid_ratio:g})"
        kept = parts if self.config.action == "stop" else {"tokenizer": parts["tokenizer"]}
        if self.crossed:
            for name, part in kept.items():
                part.load_state_dict(self.good[name])
            return line | {"guard": self.config.action, "guard_good_step": self.good_step}
        self.good = {name: _copy(part.state_dict()) for name, part in kept.items()}
        self.good_step = step
        return line

    def message(self, step: int) -> str:
        """Report of what happened, in one line."""
        parts = "tokenizer, projector and language model are" if self.stopped else "the tokenizer is frozen and"
        did = "stopped" if self.stopped else "goes on"
        return f"joint tuning {did} at step {step}: {self.crossed}; {parts} as at step {self.good_step}"

    def state_dict(self) -> dict[str, Any]:
        """For a checkpoint."""
        return {"before": self.before, "good": self.good, "good_step": self.good_step, "crossed": self.crossed}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take up a checkpoint."""
        self.before, self.good = dict(state["before"]), dict(state["good"])
        self.good_step, self.crossed = state["good_step"], state["crossed"]


def _copy(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().to("cpu", copy=True) for name, tensor in state.items()}
