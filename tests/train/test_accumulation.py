"""Micro-batches: 4 of 8 samples train as one of 32, to 1e-5 in every weight after several steps.

The runs are in float64. In float32 the sums of the two differ by rounding, and Adam divides by the size of a gradient,
so a weight whose exact gradient is zero (a bias before a normalisation) moves by up to the learning rate either way.
"""

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState

from tests.train.kinds import make_place, tiny, without_dropout
from train.state import State, build_state
from train.step import train_step

EVERYTHING = {
    "ema": 0.9,
    "objective.scale_drop": 0.5,
    "objective.loss.lecam": 0.1,
    "objective.loss.r1": 1.0,
    "objective.loss.gan": "non_saturating",
}
"""Parts that act per sample, or once per step, beside those that are on already: revival and the discriminator."""

MASKED = {"objective.method": "masked_diffusion", "objective.mask_token": "<mask>", "objective.projector": "none"}

RUNS: dict[str, tuple[str, dict[str, Any]]] = {
    "reconstruction": ("reconstruction", EVERYTHING),
    "mar": ("mar", {}),
    "language, next token": ("language", {}),
    "language, packed": ("language", {"objective.pack": 60, "objective.projector": "none"}),
    "language, masked diffusion": ("language", MASKED),
    "joint": ("joint", {}),
}


@pytest.fixture(scope="module")
def place(one_thread: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_place(tmp_path_factory.mktemp("place"))


@pytest.mark.parametrize("name", RUNS)
def test_four_micro_batches_of_8_train_as_one_of_32(name: str, place: Path, tmp_path: Path) -> None:
    kind, more = RUNS[name]
    edits = without_dropout(kind) | more
    if kind == "language" and "objective.projector" in more:
        edits |= {"objective.records": [{"path": str(place / "ids.jsonl")}]}
    one = build_state(tiny(kind, place, tmp_path, edits | {"batch_size": 32, "accumulate": 1}))
    many = build_state(tiny(kind, place, tmp_path, edits | {"batch_size": 8, "accumulate": 4}))
    before = {name: value.clone() for name, value in _weights(one).items()}
    for a, b in zip(_steps(one, 6), _steps(many, 6), strict=True):
        assert a.keys() == b.keys()
        for key in a:
            assert b[key] == pytest.approx(a[key], rel=1e-5, abs=1e-9), key
    after = _weights(many)
    for key, expected in _weights(one).items():
        torch.testing.assert_close(after[key], expected, rtol=0, atol=1e-5, msg=lambda text, key=key: f"{key}: {text}")
    for network in one.objective.networks:
        moved = [float((after[key] - before[key]).abs().max()) for key in after if key.startswith(f"{network}.")]
        assert max(moved) > 2e-4, network
    AcceleratorState._reset_state(True)


def _weights(state: State) -> dict[str, torch.Tensor]:
    networks = dict(state.objective.networks)
    if state.average is not None:
        networks["average"] = state.average
    return {f"{name}.{key}": value for name, network in networks.items() for key, value in network.state_dict().items()}


def _steps(state: State, count: int) -> Iterator[dict[str, float]]:
    """Reports of the first steps of a run in float64, stages and all."""
    objective: Any = state.objective
    for network in [*objective.networks.values(), *([state.average] if state.average is not None else [])]:
        network.double()
    if objective.kind == "language":
        objective.model.set_attn_implementation("eager")  # torch's kernel misreads a float32 mask beside float64
    whole = objective.batches
    objective.batches = lambda stage, start: (_widened(batch) for batch in whole(stage, start))
    batches = objective.batches(0, 0)
    for _ in range(count):
        yield train_step(state, [next(batches) for _ in range(state.config.accumulate)])[0]
        if state.stage_over and not state.finished:
            state.enter(state.stage + 1)
            objective.begin(state.whole(), state.stage, state.samples)
            batches = objective.batches(state.stage, state.samples)


def _widened(batch: Any) -> Any:
    tensors = {field.name: getattr(batch, field.name) for field in dataclasses.fields(batch)}
    wide = {k: v.double() for k, v in tensors.items() if isinstance(v, torch.Tensor) and v.is_floating_point()}
    return dataclasses.replace(batch, **wide)
