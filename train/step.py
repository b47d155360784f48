"""One training step, the same for every objective: losses, weighted sum, backward, clip, optimizers, after_step.

The page to read first; `loop.py` calls it. A step has one or more players (`objectives.base.Player`), such as a
tokenizer and then its discriminator. Each makes its own losses and backward passes and steps its own optimizers.
"""

import contextlib
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from tokenizers_mm._ranks import sum_over_ranks

from .engine import gradients_stay_here
from .objectives.base import Moment, Player, Terms
from .optim import descend, learning_rate
from .state import State


def train_step(state: State, batches: Sequence[Any]) -> tuple[dict[str, float], list[dict[str, Any]]]:
    """One optimizer step of every player.

    batches: the micro-batches of this process, `accumulate` of them; their gradients are summed up.
    Returns: values to report (means over all ranks), and further lines for the log.
    """
    moment = state.moment()
    report: dict[str, float] = {}
    for index, player in enumerate(state.objective.players(moment)):
        report |= _play(state, player, batches, moment, main=index == 0)
    values, notes = state.objective.after_step(moment, state.step + 1)
    if state.average is not None and state.objective.averages(state.stage):
        state.average.update_parameters(state.objective.networks[state.objective.AVERAGED])
    state.advance(len(batches))
    return report | values, notes


def _play(state: State, player: Player, batches: Sequence[Any], moment: Moment, main: bool) -> dict[str, float]:
    """The backward passes of one player, one for each micro-batch, then its optimizers; returns values to report.

    main: whether it is the first player, whose sum of losses is "loss" in the log.
    """
    objective, accelerator, config = state.objective, state.accelerator, state.config
    module, weights, report = state.module(player), objective.weights(player.name, moment), Means()
    shares, labels = _label_shares(state, player, batches)
    for index, (batch, share) in enumerate(zip(batches, shares, strict=True)):
        # The batch of a step is the first micro-batch of every process, then the second of every process, and so on.
        place = moment.at((index * accelerator.num_processes + accelerator.process_index) * config.batch_size)
        torch.manual_seed(place.number(place.row))  # dropout, and all else that a network draws by itself
        last = index == len(batches) - 1  # only its backward pass exchanges gradients with other processes
        with contextlib.nullcontext() if last else gradients_stay_here(module):
            terms, values = module(batch, place)
            terms = {name: share.get(name, 1 / len(batches)) * term for name, term in terms.items()}
            loss = weighted_sum(terms, weights)
            accelerator.backward(loss)
        report.add(terms | ({"loss": loss} if main else {}), 1.0)
        report.add(values, 1 / len(batches))
    found = report.over_ranks(accelerator.num_processes) | labels
    for name in player.optimizers:
        try:
            found |= _descend(state, name, moment, "" if main and len(player.optimizers) == 1 else f"_{name}")
        except FloatingPointError as error:
            bad = ", ".join(term for term, value in found.items() if not math.isfinite(value))
            raise FloatingPointError(f"{error}{f' (nor are: {bad})' if bad else ''}") from None
    return found


def weighted_sum(terms: Terms, weights: Mapping[str, float]) -> Tensor:
    """Sum of weight * term. Terms and weights have the same names: nothing is left out silently."""
    assert terms.keys() == weights.keys(), f"terms {sorted(terms)} and weights {sorted(weights)} differ"
    return torch.stack([weights[name] * term for name, term in terms.items()]).sum()


def _descend(state: State, name: str, moment: Moment, suffix: str) -> dict[str, float]:
    """One step of one optimizer; returns its rate and the norm of its gradients, by names that end with `suffix`."""
    learner, optimizer, scaler = state.learners[name], state.optimizers[name], state.scaler
    rate = learning_rate(learner.options, moment.step - learner.begins, moment.progress)
    norm = descend(optimizer, rate, learner.options.clip, scaler, lambda: state.not_finite(optimizer))
    if not math.isfinite(norm):
        return {"skipped_steps": 1.0, f"lr{suffix}": rate}
    return {f"grad_norm{suffix}": norm, f"lr{suffix}": rate}


def _label_shares(
    state: State, player: Player, batches: Sequence[Any]
) -> tuple[list[dict[str, float]], dict[str, float]]:
    """Factor of each term that is a mean over labels, by micro-batch, and the number of labels of the whole step.

    Micro-batches differ in their labels (words of captions, say). A mean over n of the N labels of all micro-batches of
    all ranks counts n / N, times the number of ranks, since engines average the gradients of the ranks. Terms that are
    not named here are means over samples, and every micro-batch counts alike.
    """
    counts = [state.objective.counts(player.name, batch) for batch in batches]
    names = sorted(counts[0])
    shares: list[dict[str, float]] = [{} for _ in batches]
    if not names:
        return shares, {}
    mine = torch.tensor([sum(count[name] for count in counts) for name in names], device=state.accelerator.device)
    totals = dict(zip(names, sum_over_ranks(mine).tolist(), strict=True))
    state.objective.check_labels(totals, state.step)
    world = state.accelerator.num_processes
    shares = [{name: count[name] / max(totals[name], 1) * world for name in names} for count in counts]
    return shares, {"labels": float(totals["labels"])}


class Means:
    """Sums of values by name, in float64 on their device."""

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}

    def add(self, values: Terms, share: float) -> None:
        """Add a share of each value."""
        for name, value in values.items():
            self._sums[name] = self._sums.get(name, 0.0) + value.detach().double() * share

    def over_ranks(self, world: int) -> dict[str, float]:
        """Means over the ranks, in one collective."""
        if not self._sums:
            return {}
        found = sum_over_ranks(torch.stack(list(self._sums.values()))) / world
        return dict(zip(self._sums, found.tolist(), strict=True))
