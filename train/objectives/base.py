"""The protocol between the trainer and an objective."""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from tokenizers_mm.data.sources import Batch, mix_seeds

from ..config import RunConfig
from ..optim import Learner

Networks = Mapping[str, Any]
"""Whole networks by name, the moving average in place of the network that it follows (`State.whole`)."""

Terms = dict[str, Tensor]
"""Unweighted scalar terms by name; a weight is applied to each once, in `train.step`."""


@dataclass(frozen=True)
class Stage:
    """A part of a run with optimizers and a schedule of its own."""

    name: str
    steps: int


@dataclass(frozen=True)
class Moment:
    """Position in a run. All randomness is a function of it: seed, stage, step of the stage, row of the step's batch.

    progress: share of the stage that is done, in [0, 1). row: first row of the present micro-batch in the batch of all
    processes together.
    """

    seed: int
    stage: int
    step: int
    progress: float = 0.0
    row: int = 0

    def at(self, row: int) -> "Moment":
        """The same moment at another row."""
        return replace(self, row=row)

    def number(self, row: int) -> int:
        """Seed of a row; -1 for what is drawn once per step."""
        return mix_seeds(self.seed, self.stage, self.step, row)

    def once(self, purpose: int = 1) -> torch.Generator:
        """Generator for what is drawn once per step; `purpose` (at least 1) tells several such draws apart."""
        return torch.Generator().manual_seed(self.number(-purpose))

    def rows(self, count: int) -> list[torch.Generator]:
        """One generator for each of `count` rows of the micro-batch."""
        return [torch.Generator().manual_seed(self.number(self.row + index)) for index in range(count)]


@dataclass(frozen=True)
class Player:
    """One backward pass of a step.

    networks: names of those that its losses run. optimizers: names of those that step after it.
    """

    name: str
    networks: tuple[str, ...]
    optimizers: tuple[str, ...]


class Objective(ABC):
    """Networks, data and losses of one kind of training.

    networks: all networks that may learn, by name, on the accelerator's device. stages: in order.
    """

    kind: ClassVar[str]
    Config: ClassVar[type]
    AVERAGED: ClassVar[str] = ""
    """Name of the network whose moving average `ema` keeps; empty where there is none."""

    MEASURES: ClassVar[Mapping[str, int]] = {}
    """Names of what `validate` measures: 1 where a higher value is better, -1 where a lower one is."""

    SHOWS: ClassVar[bool] = False
    """True if `show` writes images."""

    FIXED: ClassVar[tuple[str, ...]] = ()
    """Keys of its configuration that must stay as they are when a run goes on."""

    networks: dict[str, nn.Module]
    shown: Tensor | None = None
    """The first images of the run, for `show`; a part of its checkpoints, so that all grids show the same."""

    def __init__(self, run: RunConfig, accelerator: Accelerator) -> None:
        self.run, self.config, self.accelerator = run, run.objective, accelerator
        self.stages = self.stages_of(run)

    @classmethod
    def stages_of(cls, run: RunConfig) -> tuple[Stage, ...]:
        """Stages of a configuration."""
        return (Stage(cls.kind, run.steps),)

    @classmethod  # noqa: B027
    def check_config(cls, run: RunConfig) -> None:
        """Refuse values that do not go together, before anything is built."""

    @classmethod
    def sizes(cls, run: RunConfig) -> dict[str, int | str]:
        """Parameters by network, or a reason why they are not known without the weights; nothing is built in memory."""
        return {}

    @abstractmethod
    def enter(self, stage: int) -> None:
        """Set what learns in a stage and the mode of every network."""

    @abstractmethod
    def learners(self, stage: int) -> dict[str, Learner]:
        """Optimizers of a stage, by name."""

    @abstractmethod
    def players(self, moment: Moment) -> Sequence[Player]:
        """Backward passes of a step, in order."""

    @abstractmethod
    def batches(self, stage: int, start: int) -> Iterator[Any]:
        """Endless micro-batches of this process, from sample `start` of the run on (of all processes together)."""

    @abstractmethod
    def losses(self, player: str, batch: Any, moment: Moment) -> tuple[Terms, Terms]:
        """Terms of a micro-batch, and further values to report (detached means over its samples)."""

    @abstractmethod
    def weights(self, player: str, moment: Moment) -> dict[str, float]:
        """Weight of every term of a player; its keys are exactly those of the terms."""

    @abstractmethod
    def save(self, networks: Networks, folder: Path) -> None:
        """Write the finished networks."""

    def counts(self, player: str, batch: Any) -> dict[str, int]:
        """Size of a micro-batch by term, for terms that are means over labels, and the number of "labels" to report.

        All other terms weigh the same in every micro-batch.
        """
        return {}

    def check_labels(self, totals: Mapping[str, int], step: int) -> None:  # noqa: B027
        """Refuse a step with too few labels (of all processes together), where there is such a thing."""

    def begin(self, networks: Networks, stage: int, start: int) -> list[dict[str, Any]]:
        """Work before the first step of a stage, at sample `start`; returns lines for the log.

        Before the first stage these are the networks that will learn; later they may be copies of them.
        """
        return []

    def after_step(self, moment: Moment, step: int) -> tuple[dict[str, float], list[dict[str, Any]]]:
        """Work after the optimizers' step `step` of the run; returns values to report and lines for the log."""
        return {}, []

    def skipped(self, batch: Any) -> Sequence[str]:
        """Inputs that a micro-batch left out, each with the reason."""
        return batch.skipped if isinstance(batch, Batch) else ()

    def window(self) -> dict[str, float]:
        """Values gathered since the last call, for a line of the log."""
        return {}

    def keep_shown(self, images: Tensor) -> None:
        """Remember images [B, 3, H, W] for `show`, if they are the first and samples are asked for."""
        if self.shown is None and self.run.sample_every:
            self.shown = images[:8].to("cpu")

    def show(self, networks: Networks, path: Path) -> None:  # noqa: B027
        """Write a few samples to a PNG file."""

    def validate(self, networks: Networks) -> dict[str, float]:
        """Measurements on held-out samples, by the names of `MEASURES`."""
        return {}

    def averages(self, stage: int) -> bool:
        """True if the moving average follows in a stage."""
        return True

    def saved(self) -> Mapping[str, Any]:
        """Everything with a state_dict that belongs in a checkpoint, by name, but for optimizers and the average."""
        return self.networks

    def changing(self) -> Mapping[str, Any]:
        """Parts that change beside all that, by name; each has `state_dict` and `load_state_dict`."""
        return {}

    def state_dict(self) -> dict[str, Any]:
        """Further values that change, as numbers, texts and tensors."""
        return {"shown": self.shown} | {name: part.state_dict() for name, part in self.changing().items()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` returned."""
        self.shown = state["shown"]
        for name, part in self.changing().items():
            part.load_state_dict(state[name])

    def fixed_here(self) -> frozenset[str]:
        """Further keys of the whole configuration that must stay, given the rest of it."""
        return frozenset()

    @property
    def stopped(self) -> bool:
        """True if the objective ended the run before its last step."""
        return False
