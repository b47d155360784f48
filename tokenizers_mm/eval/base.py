"""Base classes of metrics, and the data that a metric is given.

A metric takes one batch after another and keeps either one number per image or sums of fixed size. Its state is a set
of tensors, so that an interrupted run can go on.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, TypeVar

import torch
from torch import Tensor

from tokenizers_mm._check import fail, require
from tokenizers_mm.eval.protocols import Protocol
from tokenizers_mm.eval.towers import Tower
from tokenizers_mm.types import ImageCodes

Made = TypeVar("Made")


@dataclass(frozen=True)
class Batch:
    """Images of one size, and what a tokenizer made of them.

    originals, reconstructions: [B, 3, H, W] in [-1, 1] on the CPU, the latter finished by the protocol.
    codes: ids on the CPU, None for a continuous tokenizer or a codec. bits: of each image, nominal.
    features: of the originals by the tokenizer, [B, C], None where nothing asks for them.
    labels: class of each image, -1 for none. captions: text of each image, "" for none.
    semantic: features [B, T, C] that the tokenizer decodes from its codes, None where nothing asks for them.
    shared: what metrics computed from the originals, by name: of use to the next tokenizer. own: the same from the
        reconstructions, of use to the next metric.
    """

    originals: Tensor
    reconstructions: Tensor
    codes: ImageCodes | None = None
    bits: Sequence[float] = ()
    features: Tensor | None = None
    labels: Sequence[int] = ()
    captions: Sequence[str] = ()
    semantic: Tensor | None = None
    shared: dict[str, Any] = field(default_factory=dict)
    own: dict[str, Any] = field(default_factory=dict)

    def once(self, name: str, make: Callable[[Tensor], Made]) -> tuple[Made, Made]:
        """`make` of originals and of reconstructions, each computed once under this name."""
        for known, images in ((self.shared, self.originals), (self.own, self.reconstructions)):
            if name not in known:
                known[name] = make(images)
        return self.shared[name], self.own[name]


@dataclass(frozen=True)
class Setup:
    """Choices of a run that metrics read.

    weights: files by name ("inception", "vgg16", "dists"; "tower": a directory, see `towers`). extractor: name of a
    feature extractor registered with torch-fidelity that stands in for Inception. tower: of images and texts, in place
    of that directory. device: where networks of metrics run. seed: of random splits. classes: names of the images'
    classes, which `begin` takes from their source.
    """

    protocol: Protocol
    weights: Mapping[str, str] = field(default_factory=dict)
    extractor: str = ""
    device: str = "cpu"
    seed: int = 0
    tower: Tower | None = None
    classes: Sequence[str] = ()

    def __post_init__(self) -> None:
        require(0 <= self.seed < 1 << 63, "seed", f"a number from 0 to {(1 << 63) - 1}", self.seed)


class Metric(ABC):
    """A metric over a set of images.

    name, label, unit: in the table and in the report. better: "higher", "lower" or "" for neither. needs: what must be
    there, in words, "" for nothing. default: measured unless other metrics are asked for.
    The constructor raises ValueError or ImportError, one sentence, where something is missing.
    """

    name: ClassVar[str]
    label: ClassVar[str]
    unit: ClassVar[str] = ""
    better: ClassVar[Literal["higher", "lower", ""]] = ""
    needs: ClassVar[str] = ""
    default: ClassVar[bool] = True
    reads_features: bool = False
    reads_semantic: bool = False
    small: ClassVar[bool] = False
    """True if it computes with the values of one image at a time, so that one thread is faster than several."""

    least: ClassVar[int] = 1
    """Pixels that both sides of an image need."""

    def __init__(self, setup: Setup) -> None:
        self.setup = setup

    @abstractmethod
    def update(self, batch: Batch) -> None:
        """Take a batch."""

    @abstractmethod
    def result(self) -> Any:
        """A number, a mapping, or None where there is nothing to say; ValueError, one sentence, says why."""

    def per_image(self) -> Sequence[float] | None:
        """One number per image that was taken, NaN for those left out; their mean is the result. None: there are none.

        For confidence intervals and paired tests; ValueError as `result`.
        """
        return None

    @abstractmethod
    def state(self) -> dict[str, Tensor]:
        """Tensors from which `restore` makes the same metric."""

    @abstractmethod
    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Take the state of another object of this class, from a file; attributes are replaced, not changed.

        Raises:
            ValueError: a tensor is missing or has another form.
        """


def stored(state: Mapping[str, Tensor], name: str, dtype: torch.dtype, ndim: int) -> Tensor:
    """A tensor of a metric's state; ValueError where it is missing, or has another number of axes or kind of number."""
    found = state.get(name)
    right = found is not None and found.is_floating_point() == dtype.is_floating_point and found.ndim == ndim
    require(right, f"state.{name}", f"{str(dtype).removeprefix('torch.')} with {ndim} axes", found)
    assert found is not None
    return found


class PerImage(Metric):
    """A metric with one number per image; NaN marks an image that it cannot say anything about."""

    infinite: ClassVar[bool] = False
    """True if infinity is a value; such images are counted and left out of the mean."""

    partial: ClassVar[bool] = False
    """True if `scores` may leave images out (NaN): those without text or faces, for example."""

    def __init__(self, setup: Setup) -> None:
        super().__init__(setup)
        self.values: list[float] = []

    @abstractmethod
    def scores(self, batch: Batch) -> Tensor:
        """One number per image, [B]."""

    def update(self, batch: Batch) -> None:
        if min(batch.originals.shape[-2:]) < self.least:
            self.values += [math.nan] * len(batch.originals)
            return
        scores = self.scores(batch).double().tolist()
        bad = [value for value in scores if not (math.isfinite(value) or self._allows(value))]
        require(not bad, self.name, "finite values", f"{bad[:3]}")
        self.values += scores

    def _allows(self, value: float) -> bool:
        """True for a value that is not finite, and has a meaning here."""
        return self.partial if math.isnan(value) else self.infinite and value > 0

    def per_image(self) -> Sequence[float]:
        return self.values

    def result(self) -> float | dict[str, float] | None:
        finite = [value for value in self.values if math.isfinite(value)]
        if not finite and all(math.isnan(value) for value in self.values):
            if self.least > 1:
                fail(self.name, f"images of at least {self.least} x {self.least} pixels", "smaller ones")
            fail(self.name, "images that it can be measured on", "none")
        return math.fsum(finite) / len(finite) if finite else None

    def state(self) -> dict[str, Tensor]:
        return {"values": torch.tensor(self.values, dtype=torch.float64)}

    def restore(self, state: Mapping[str, Tensor]) -> None:
        self.values = stored(state, "values", torch.float64, 1).tolist()
