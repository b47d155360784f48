"""Ids that do not depend on the batch, the threads, the machine or the dtype.

*The* ids of an image are those that the tokenizer gives when everything is computed in float64 from its weights, which
rounding on a machine moves by about 1e-15 only. Computing everything so would take several times as long. Therefore:

1. The image goes through the networks in float32 (evaluation mode, no autocast, no TF32), and every search says its
   margin: by how much the nearest code wins (`kernels.nearest_code`). A margin changes with the features; the error of
   a margin is the difference of its float32 and its float64 value, taken with its sign where they disagree about the
   code.
2. The first images (`CALIBRATION` ids) are computed in float64 too. This measures the errors of this model, on this
   machine, with these images, for every search of a pass (a scale or a stream) apart. `SAFETY` times the largest error
   seen so far is the bound of that search; one with less than `FEW` measurements takes the largest of all searches.
3. An image in which no margin is below its bound keeps its float32 ids. The others are decided again, whole, in
   float64: later scales of residual quantizers depend on earlier ids. Where this happens to none of `AUDIT` images, one
   of them is decided again in any case. Each adds to the measurements, so a bound that is too small for new images
   grows.

The bound is measured, not proven: errors of one search are sums of very many roundings, and their largest value over
thousands of positions changes little from one sample to the next. How little the promise rests on luck is in the
report: `Stability.largest`, the largest error as a share of the bound in force when it was met, was 1 / SAFETY or
little more in all measurements. Margins that are too small for float64 too are counted as `undecided`.

An image whose values are all within rounding of the 8-bit levels u / 127.5 - 1 is taken as that 8-bit image, so that
float32, float16 and bfloat16 tensors of one image are one image. Other tensors are taken as they are.

A tokenizer that narrows to float32 in the middle of its float64 pass, draws random numbers, or has a quantizer without
margins cannot promise anything, and is refused with a sentence that says why.
"""

import copy
import weakref
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from tokenizers_mm._check import require
from tokenizers_mm.kernels._ops import content
from tokenizers_mm.kernels.decisions import Decision, watch_decisions
from tokenizers_mm.models.exactness import Watcher
from tokenizers_mm.types import ImageCodes, join_codes

SAFETY = 2.0
"""The bound of a margin's error, relative to the largest error measured."""

CALIBRATION = 4096
"""Ids that are computed both ways before float32 is trusted."""

FEW = 512
"""Measurements from which on a search has a bound of its own."""

AUDIT = 256
"""Number of images after which one is decided again without need, where none of them was."""

WIDE_ROUNDING = 2.0**-26
"""Bound of float64 errors, relative to those of float32: 2^-29, times 8."""

WAITING = 4
"""Limit of the doubtful images of all sizes that wait, in batches of those that are decided again together."""


@dataclass(frozen=True)
class Stability:
    """Counts of what `encode(..., stable=True)` did with a tokenizer so far.

    images, ids: all of them. again: images that were decided again in float64. changed: ids that float64 decided
    otherwise. undecided: ids with a margin that is too small for float64 too. bounds: of the error of a margin, by
    search, in the units of its distances. largest: the largest error met, relative to the bound then in force; above 1
    the bound was broken, and ids before that may be wrong.
    """

    images: int = 0
    ids: int = 0
    again: int = 0
    changed: int = 0
    undecided: int = 0
    bounds: tuple[float, ...] = ()
    largest: float = 0.0

    def __str__(self) -> str:
        share = 100 * self.again / max(self.images, 1)
        text = f"{self.again} of {self.images} images ({share:.1f} %) decided again in float64"
        return f"{text}, which changed {self.changed} of {self.ids} ids; {self.undecided} ids undecided"


@dataclass(frozen=True)
class _Pass:
    """Images [B, 3, H, W], their float32 codes, the decisions behind these, and which are doubtful, bool [B]."""

    x: Tensor
    codes: ImageCodes
    decisions: list[Decision]
    doubtful: Tensor

    def take(self, rows: Tensor) -> "_Pass":
        """Some of the images."""
        here = rows.to(self.x.device)
        decisions = [Decision(d.ids[here], None if d.margin is None else d.margin[here]) for d in self.decisions]
        return _Pass(self.x[here], _some(self.codes, here), decisions, self.doubtful[rows])

    @staticmethod
    def join(parts: "Sequence[_Pass]") -> "_Pass":
        """Images of one size from several passes."""
        decisions = []
        for each in zip(*(part.decisions for part in parts), strict=True):
            margins = [d.margin for d in each if d.margin is not None]
            decisions.append(Decision(torch.cat([d.ids for d in each]), torch.cat(margins)))
        codes = join_codes([part.codes for part in parts])
        return _Pass(torch.cat([part.x for part in parts]), codes, decisions, torch.cat([p.doubtful for p in parts]))


class StableEncoder:
    """The stable ids of one tokenizer; it keeps a float64 copy of what encoding needs, made when first used."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = weakref.ref(tokenizer)
        self.report = Stability()
        self._state: list[Any] = []
        self._single: Any = None
        self._wide: Any = None
        self._copies: list[Tensor] = []
        self._largest: list[float] = []
        self._counts: list[int] = []
        self._unchecked = 0
        self._trusted = False

    @torch.no_grad()
    def encode(self, x: Tensor) -> ImageCodes:
        """The stable ids, with margins, of a checked float tensor [B, 3, H, W] on the tokenizer's device."""
        first = self._first_pass(eight_bit(x), _tensors(self._of()))
        doubtful = first.doubtful.nonzero().flatten()
        again = self._decide_again(first.take(doubtful)) if len(doubtful) else None
        return first.codes if again is None else _replaced(first.codes, doubtful, again)

    @torch.no_grad()
    def encode_many(
        self, batches: Iterable[tuple[list[int], Tensor]], pixels: int
    ) -> Iterator[tuple[list[int], ImageCodes]]:
        """(numbers, stable codes) for batches (numbers, images), not in order: doubtful images wait for others.

        x is a float32 tensor [B, 3, H, W] of 8-bit images on the tokenizer's device, as `image_to_tensor` makes them.
        pixels: of the images that are decided again together, which takes less time; at least one image.
        """
        waiting: dict[torch.Size, list[tuple[int, _Pass]]] = {}
        tensors = _tensors(self._of())
        for numbers, x in batches:
            first = self._first_pass(x, tensors)
            doubtful = first.doubtful.tolist()
            if not any(doubtful):
                yield numbers, first.codes
                continue
            sure = (~first.doubtful).nonzero().flatten()
            if len(sure):
                yield [numbers[row] for row in sure.tolist()], _some(first.codes, sure.to(x.device))
            members = waiting.setdefault(x.shape[1:], [])
            members += [(numbers[row], first.take(torch.tensor([row]))) for row in range(len(x)) if doubtful[row]]
            together = max(1, pixels // x[0, 0].numel())
            while len(members) >= together:
                yield self._decide_waiting(members[:together])
                del members[:together]
            held = {size: size.numel() * len(members) for size, members in waiting.items()}
            if sum(held.values()) > 3 * WAITING * pixels:
                yield self._decide_waiting(waiting.pop(max(held, key=lambda size: held[size])))
        for members in waiting.values():
            if members:
                yield self._decide_waiting(members)

    def _decide_waiting(self, members: "Sequence[tuple[int, _Pass]]") -> tuple[list[int], ImageCodes]:
        """Images of one size, which are fewer than `pixels` allows."""
        return [number for number, _ in members], self._decide_again(_Pass.join([part for _, part in members]))

    def _of(self) -> Any:
        tokenizer = self._tokenizer()
        assert tokenizer is not None
        return tokenizer

    def _first_pass(self, x: Tensor, tensors: Sequence[Tensor]) -> "_Pass":
        """float32 ids, and which images are to be decided again. Measures first, while too little is known.

        tensors: result of `_tensors`, which is not looked for in every batch.
        """
        tokenizer = self._of()
        self._renew(tokenizer, tensors)
        with _plain_arithmetic(x.device), _evaluating(tokenizer):
            codes, decisions = self._run(tokenizer if self._single is None else self._single, x)
        codes = replace(codes, margins=_aligned(codes.ids, decisions))
        made = _Pass(x, codes, decisions, torch.zeros(len(x), dtype=torch.bool))
        each = max(1, codes.ids.shape[1])
        missing = min(len(x), max(0, -(-(CALIBRATION - sum(self._counts)) // each)))
        if missing:
            rows = torch.arange(missing)
            made = replace(made, codes=_replaced(codes, rows, self._decide_again(made.take(rows))))
        if missing < len(x):
            doubtful = torch.zeros(len(x), dtype=torch.bool, device=x.device)
            for number, decision in enumerate(decisions):
                assert decision.margin is not None
                doubtful |= decision.margin.amin(1) < self._bound(number)
            doubtful = doubtful.cpu()
            doubtful[:missing] = False
            self._unchecked = 0 if bool(doubtful.any()) else self._unchecked + len(x)
            if self._unchecked >= AUDIT:
                doubtful[-1], self._unchecked = True, 0
            made = replace(made, doubtful=doubtful)
        images, ids = self.report.images + len(x), self.report.ids + codes.ids.numel()
        bounds = tuple(self._bound(number) for number in range(len(self._counts)))
        self.report = replace(self.report, images=images, ids=ids, bounds=bounds)
        return made

    def _decide_again(self, first: "_Pass") -> ImageCodes:
        """The float64 codes of images; learns from the differences to their float32 ones."""
        exact_x, watcher = first.x.double(), None if self._trusted else Watcher()
        with _plain_arithmetic(exact_x.device), nullcontext() if watcher is None else watcher:
            codes, found = self._run(self._wide, exact_x)
        if watcher is not None:
            watcher.refuse()
            self._trusted = True
        same = torch.ones(len(exact_x), dtype=torch.bool, device=exact_x.device)
        undecided = 0
        for number, (single, wide) in enumerate(zip(first.decisions, found, strict=True)):
            assert single.margin is not None
            assert wide.margin is not None
            small, exact = single.margin.double(), wide.margin.double()
            agree = single.ids == wide.ids
            if bool(same.any()):
                error = torch.where(agree, (small - exact).abs(), small + exact)[same].nan_to_num(0, 0, 0)
                self._learn(number, float(error.max()), error.numel())
            undecided += int((exact < self._bound(number) * WIDE_ROUNDING).sum())
            same &= agree.all(1)
        self.report = replace(
            self.report,
            again=self.report.again + len(exact_x),
            changed=self.report.changed + int((first.codes.ids != codes.ids).sum()),
            undecided=self.report.undecided + undecided,
        )
        return replace(codes, margins=_aligned(codes.ids, found))

    def _learn(self, number: int, error: float, count: int) -> None:
        if sum(self._counts) >= CALIBRATION:
            share = error / max(self._bound(number), 1e-300)
            self.report = replace(self.report, largest=max(self.report.largest, share))
        self._largest[number] = max(self._largest[number], error)
        self._counts[number] += count

    def _bound(self, number: int) -> float:
        few = self._counts[number] < FEW
        return SAFETY * (max(self._largest) if few else self._largest[number])

    def _run(self, model: Any, x: Tensor) -> tuple[ImageCodes, list[Decision]]:
        """Codes and the decisions behind them, each as [B, n]. The class's method: one that was compiled is not run."""
        with watch_decisions() as found:
            codes = type(model).encode_tensor(model, x)
        require(isinstance(codes, ImageCodes), "stable", "a tokenizer with ids", f"a continuous one ({model.family})")
        told = sum(decision.ids.numel() for decision in found if decision.margin is not None)
        require(told == codes.ids.numel(), "stable", f"a margin for each of {codes.ids.numel()} ids", f"{told} margins")
        flat = [
            Decision(d.ids.reshape(len(x), -1), d.margin.reshape(len(x), -1)) for d in found if d.margin is not None
        ]
        missing = len(flat) - len(self._counts)
        self._counts += [0] * missing
        self._largest += [0.0] * missing
        return codes, flat

    def _renew(self, tokenizer: Any, tensors: Sequence[Tensor]) -> None:
        """Make the copies, and forget the measurements, where the weights are others than before.

        Their content decides, read at the speed of memory: `.data`, other processes and foreign pointers change no
        version. Where no library reads it, the weights are compared with the copy.
        """
        state = [(tensor.dtype, tensor.device, content(tensor)) for tensor in tensors]
        unread = [number for number, (*_, found) in enumerate(state) if found is None]
        if state == self._state and _equal([(tensors[n], self._copies[n]) for n in unread]):
            return
        floats = {t.dtype for t in tensors if t.is_floating_point()}
        self._single = None if floats <= {torch.float32} else _converted(tokenizer, torch.float32)
        self._wide = _converted(tokenizer, torch.float64)
        self._copies = _tensors(self._wide)
        self._state, self._counts, self._largest, self._trusted, self._unchecked = state, [], [], False, 0
        self.report = Stability()


_encoders: "weakref.WeakKeyDictionary[Any, StableEncoder]" = weakref.WeakKeyDictionary()


def stable_encoder(tokenizer: Any) -> StableEncoder:
    """The encoder of a tokenizer, the same one for every call."""
    if tokenizer not in _encoders:
        _encoders[tokenizer] = StableEncoder(tokenizer)
    return _encoders[tokenizer]


def eight_bit(x: Tensor) -> Tensor:
    """x [B, 3, H, W] in float32, and images that are 8-bit ones up to the rounding of x's dtype as exactly those."""
    wide = x if x.dtype == torch.float64 else x.float()
    whole = wide.add(1).mul_(127.5).round_().clamp_(0, 255)
    if x.device.type == "cpu":
        near = whole.float().div_(127.5).sub_(1)  # as `image_to_tensor` computes them
    else:  # elsewhere a division by a number may be a product with its inverse
        near = (torch.arange(256, dtype=torch.float32) / 127.5 - 1).to(x.device)[whole.long()]
    if torch.equal(near, wide):
        return near
    allowed = min(torch.finfo(x.dtype).eps / 4, 2.0**-8) * 1.01 + 1e-6
    whole = ((wide - near).abs() <= allowed).flatten(1).all(1)
    return torch.where(whole[:, None, None, None], near, wide.float())


def _converted(tokenizer: Any, dtype: torch.dtype) -> Any:
    """A copy in another dtype and evaluation mode; what only decodes is shared, compiled parts are taken back."""
    shared = {id(part): part for name, part in tokenizer.named_children() if name in tokenizer.ONLY_DECODE}
    made = copy.deepcopy(tokenizer, shared)
    for name, part in list(made.named_children()):
        if name in tokenizer.ONLY_DECODE:
            continue
        setattr(made, name, _eager(part).to(dtype))
    for name, parameter in list(made.named_parameters(recurse=False)):
        setattr(made, name, nn.Parameter(parameter.detach().to(dtype), requires_grad=False))
    for name, buffer in list(made.named_buffers(recurse=False)):
        setattr(made, name, buffer.to(dtype) if buffer.is_floating_point() else buffer)
    for module in (part for name, part in made.named_children() if name not in tokenizer.ONLY_DECODE):
        module.eval()
    made.training = False
    return made


def _eager(module: nn.Module) -> nn.Module:
    """A module with the parts that torch.compile made taken back."""
    if hasattr(module, "_orig_mod"):
        module = module._orig_mod  # type: ignore[assignment]
    for each in module.modules():
        each._compiled_call_impl = None  # type: ignore[assignment]
    for name, part in list(module.named_children()):
        setattr(module, name, _eager(part))
    return module


def _tensors(tokenizer: Any) -> list[Tensor]:
    """Parameters and buffers that encoding needs, read at every call: `named_parameters` takes ten times as long."""
    found: list[Tensor | None] = [*tokenizer._parameters.values(), *tokenizer._buffers.values()]
    waiting = [part for name, part in tokenizer._modules.items() if name not in tokenizer.ONLY_DECODE]
    while waiting:
        part = waiting.pop()
        if part is not None:
            found.extend(part._parameters.values())
            found.extend(part._buffers.values())
            waiting.extend(part._modules.values())
    return [tensor for tensor in found if tensor is not None]


def _equal(pairs: Sequence[tuple[Tensor, Tensor]]) -> bool:
    """True if the tensors of each pair hold the same values, in whatever dtypes; one wait for the device."""
    same = [(one.detach() == other).all() for one, other in pairs if one.shape == other.shape]
    return len(same) == len(pairs) and (not same or bool(torch.stack(same).all()))


def _some(codes: ImageCodes, rows: Tensor) -> ImageCodes:
    margins = None if codes.margins is None else codes.margins[rows]
    return replace(codes, ids=codes.ids[rows], margins=margins)


def _replaced(codes: ImageCodes, rows: Tensor, others: ImageCodes) -> ImageCodes:
    """Codes with some rows taken from others."""
    rows = rows.to(codes.ids.device)
    margins = None
    if codes.margins is not None and others.margins is not None:
        margins = codes.margins.index_copy(0, rows, others.margins)
    return replace(codes, ids=codes.ids.index_copy(0, rows, others.ids), margins=margins)


def _aligned(ids: Tensor, decisions: Sequence[Decision]) -> Tensor | None:
    """Margins float32 [B, L] in the order of the ids: one search after the other, each with its groups of ids side by
    side or one after the other. None for other orders (several stages inside of several scales).
    """
    parts, start = [], 0
    for decision in decisions:
        count = decision.ids.shape[1]
        wanted = ids[:, start : start + count]
        start += count
        for groups in (number for number in range(1, 65) if count % number == 0):
            if torch.equal(_side_by_side(decision.ids, groups), wanted):
                assert decision.margin is not None
                parts.append(_side_by_side(decision.margin, groups).float())
                break
        else:
            return None
    return torch.cat(parts, 1)


def _side_by_side(values: Tensor, groups: int) -> Tensor:
    """Values [B, n * groups], groups innermost, as one group after the other; for one group a view."""
    return values.unflatten(1, (-1, groups)).transpose(1, 2).flatten(1)


@contextmanager
def _plain_arithmetic(device: torch.device) -> Iterator[None]:
    """float32 that is float32: no autocast, and neither TF32 nor bfloat16 inside of products and convolutions."""
    precision, cudnn = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = False
    try:
        with torch.autocast(device.type, enabled=False):
            yield
    finally:
        torch.set_float32_matmul_precision(precision)
        torch.backends.cudnn.allow_tf32 = cudnn


@contextmanager
def _evaluating(module: nn.Module) -> Iterator[None]:
    """Evaluation mode inside the block, the modes of before after it."""
    training = [part for part in module.modules() if part.training] if module.training else []
    for part in training:
        part.training = False
    try:
        yield
    finally:
        for part in training:
            part.training = True
