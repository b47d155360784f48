"""Everything that changes during a run: networks, optimizers, moving average and counters."""

import math
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from tokenizers_mm._check import fail, require
from tokenizers_mm._ranks import several
from tokenizers_mm.functional.precision import at_least_float32

from .config import RunConfig, objective_class
from .distributed import count_over_ranks, make_accelerator
from .engine import (
    average_gradients,
    compile_networks,
    filled,
    local,
    on_local_shards,
    recompute_activations,
    shard,
    shard_average,
    shard_optimizer,
    skeleton,
)
from .objectives.base import Moment, Objective, Player, Stage, Terms
from .optim import Learner, adamw, load_optimizer

COUNTERS = ("step", "stage", "stage_step", "samples", "seconds", "stage_seconds", "best", "reported")
"""Fields of a state that a checkpoint holds as they are."""


class Pass(nn.Module):
    """Forward pass of a player as one module, so that an engine sees its parameters and its outputs.

    player: its name, which may be another one in another stage.
    """

    def __init__(self, objective: Objective, player: Player) -> None:
        super().__init__()
        self.networks = nn.ModuleDict({name: objective.networks[name] for name in player.networks})
        self.player, self._objective = player.name, objective

    def forward(self, batch: Any, moment: Moment) -> tuple[Terms, Terms]:
        with self._objective.accelerator.autocast():
            terms, values = self._objective.losses(self.player, batch, moment)
        terms = {name: at_least_float32(term) for name, term in terms.items()}
        if idle := self._idle(any(term.requires_grad for term in terms.values())):
            first = next(iter(terms))
            terms[first] = terms[first] + 0.0 * torch.stack(idle).sum()
        return terms, values

    def _idle(self, learns: bool) -> list[torch.Tensor]:
        """One element of each parameter that must have a gradient although this batch may not use it.

        Engines wait for gradients: for one where nothing here has a label, since other ranks may have some, and for all
        of those that are sharded as one group.
        """
        if learns and not isinstance(self, FSDPModule):
            return []
        whole = [p for p in self.parameters() if p.requires_grad and not isinstance(p, DTensor)]
        return [p.flatten()[0] for p in (whole if learns else whole[:1])]


@dataclass
class State:
    """A run.

    step: over all stages. samples: that all processes together have used. seconds: of training, over all stages.
    best: the best validated value of `config.best` so far. reported: sum and number of the values of every name since
    the last line of the log. skipped: inputs that this process left out since then, by cause.
    """

    config: RunConfig
    accelerator: Accelerator
    objective: Objective
    average: AveragedModel | None = None
    learners: dict[str, Learner] = field(default_factory=dict)
    optimizers: dict[str, torch.optim.Optimizer] = field(default_factory=dict)
    stage: int = 0
    stage_step: int = 0
    step: int = 0
    samples: int = 0
    seconds: float = 0.0
    stage_seconds: float = 0.0
    best: float | None = None
    reported: dict[str, Any] = field(default_factory=dict)
    skipped: Counter[str] = field(default_factory=Counter)
    _passes: dict[Player, nn.Module] = field(default_factory=dict)
    _sharded: Pass | None = None
    _skeletons: dict[str, nn.Module] = field(default_factory=dict)

    @property
    def scaler(self) -> Any:
        """Gradient scaler of float16, or None."""
        return self.accelerator.scaler if self.config.precision == "fp16" else None

    def whole(self) -> dict[str, Any]:
        """Networks to measure, to show and to save: the moving average in place of the network that it follows.

        Called on every rank: what is sharded is gathered into copies.
        """
        found = dict(self.objective.networks)
        if self.average is not None:
            found[self.objective.AVERAGED] = self.average.module
        return found | {name: filled(structure, found[name]) for name, structure in self._skeletons.items()}

    @property
    def averaged(self) -> Any:
        """The network of `whole` that a moving average may follow."""
        return self.whole().get(self.objective.AVERAGED)

    @property
    def steps(self) -> int:
        """Steps of all stages."""
        return sum(stage.steps for stage in self.objective.stages)

    @property
    def current(self) -> Stage:
        """The present stage."""
        return self.objective.stages[self.stage]

    @property
    def timed(self) -> bool:
        """True if the present stage ends by time."""
        return bool(self.config.max_seconds) and self.stage == len(self.objective.stages) - 1

    @property
    def stage_over(self) -> bool:
        """True if the present stage has no step left."""
        late = self.timed and self.stage_seconds >= self.config.max_seconds
        return self.stage_step >= self.current.steps or late

    @property
    def finished(self) -> bool:
        """True if the run has no step left."""
        return self.objective.stopped or (self.stage == len(self.objective.stages) - 1 and self.stage_over)

    def moment(self) -> Moment:
        """Position of the next step, with the share of the stage that is done by steps or by time."""
        progress = self.stage_step / self.current.steps
        if self.timed:
            progress = max(progress, self.stage_seconds / self.config.max_seconds)
        return Moment(self.config.seed, self.stage, self.stage_step, min(progress, 1.0))

    def enter(self, stage: int) -> None:
        """Take up a stage at its first step, with new optimizers."""
        self.stage, self.stage_step, self.stage_seconds = stage, 0, 0.0
        self.objective.enter(stage)
        self.learners = self.objective.learners(stage)
        self.optimizers = {name: adamw(learner) for name, learner in self.learners.items()}
        self._passes = {}

    def module(self, player: Player) -> nn.Module:
        """Forward pass of a player, wrapped by the engine of several processes."""
        if self.config.engine == "fsdp" and several() and self._sharded is None:
            self._shard()
        if player not in self._passes:
            module = Pass(self.objective, player)
            if self._sharded is not None and self._sharded.networks.keys() == module.networks.keys():
                module = self._sharded
                module.player = player.name
            self._passes[player] = average_gradients(module, self.accelerator.device)
        return self._passes[player]

    def _shard(self) -> None:
        """Shard the networks of the first player with their moments and moving average.

        It happens at the first step, when all start or restored values are in place on every process. A network that
        other players run too (a discriminator) stays whole.
        """
        objective = self.objective
        module = Pass(objective, objective.players(self.moment())[0])
        before = dict(module.named_parameters(remove_duplicate=False))
        self._skeletons = {name: skeleton(network) for name, network in module.networks.items()}
        shard(module, self.accelerator.device)
        after = dict(module.named_parameters(remove_duplicate=False))
        for optimizer in self.optimizers.values():
            shard_optimizer(optimizer, {whole: after[name] for name, whole in before.items()})
        if self.average is not None:
            shard_average(self.average.module, objective.networks[objective.AVERAGED])
        self.learners, self._sharded = objective.learners(self.stage), module

    def advance(self, micro_batches: int) -> None:
        """Count a step."""
        self.step, self.stage_step = self.step + 1, self.stage_step + 1
        self.samples += micro_batches * self.config.batch_size * self.accelerator.num_processes

    def not_finite(self, optimizer: torch.optim.Optimizer) -> None:
        """Stop the run with the name of the first tensor that is not finite, unless such steps are to be skipped."""
        if self.config.non_finite == "skip":
            return
        mine = {id(p) for group in optimizer.param_groups for p in group["params"]}
        named = list(nn.ModuleDict(self.objective.networks).named_parameters())
        tensors = [(f"weights of {name}", p) for name, p in named]
        tensors += [(f"gradients of {name}", p.grad) for name, p in named if id(p) in mine and p.grad is not None]
        bad = (name for name, tensor in tensors if not bool(torch.isfinite(local(tensor)).all()))
        raise FloatingPointError(f"{next(bad, 'gradients')} are not finite at step {self.step}")

    def tensors(self) -> dict[str, Any]:
        """Everything with a state_dict, by name."""
        found = {f"network {name}": thing for name, thing in self.objective.saved().items()}
        found |= {f"optimizer {name}": thing for name, thing in self.optimizers.items()}
        found |= {"objective": self.objective}
        found |= {} if self.average is None else {"average": self.average}
        return found if self.scaler is None else found | {"scaler": self.scaler}

    def state_dict(self) -> dict[str, Any]:
        """Contents of a checkpoint. RNG state is not in it: randomness is a function of seed, stage, step and row."""
        counters = {name: getattr(self, name) for name in COUNTERS} | {"skipped": count_over_ranks(self.skipped)}
        return {"counters": counters, **{name: thing.state_dict() for name, thing in self.tensors().items()}}

    def load_state_dict(self, data: dict[str, Any]) -> None:
        """Continue from the contents of a checkpoint."""
        counters = data["counters"]
        for name in (*COUNTERS, "skipped"):
            _check_counter(name, counters.get(name, ""))
        last = len(self.objective.stages) - 1
        require(counters["stage"] <= last, "checkpoint: stage", f"0 to {last}", counters["stage"])
        self.enter(counters["stage"])
        expected = self.tensors()
        if data.keys() != {"counters", *expected}:
            other = sorted(map(str, data.keys() ^ {"counters", *expected}))
            fail("checkpoint", "the parts of this configuration", f"a difference in {', '.join(other)}")
        for name, thing in expected.items():
            try:
                if isinstance(thing, torch.optim.Optimizer):
                    load_optimizer(thing, data[name])
                else:
                    thing.load_state_dict(data[name])
            except (RuntimeError, ValueError, KeyError) as error:
                why = str(error).splitlines()[0]
                raise ValueError(f"checkpoint: expected {name} of this configuration, got {why}") from None
        for name in COUNTERS:
            setattr(self, name, counters[name])
        self.skipped = Counter(counters["skipped"] if self.accelerator.is_main_process else {})
        self.objective.enter(self.stage)  # the restored state may say what learns


def build_state(config: RunConfig, accelerator: Accelerator | None = None) -> State:
    """Build networks and the optimizers of the first stage."""
    accelerator = accelerator or make_accelerator(config)
    torch.manual_seed(config.seed)
    objective = objective_class(config.objective.kind)(config, accelerator)
    state = State(config, accelerator, objective)
    if config.ema:
        network = objective.networks[objective.AVERAGED]
        follow = on_local_shards(get_ema_multi_avg_fn(config.ema))
        state.average = AveragedModel(network, multi_avg_fn=follow, use_buffers=True)
        state.average.eval()
    learning = [network for name, network in objective.networks.items() if name != "discriminator"]
    if config.gradient_checkpointing:
        blocks = sum(map(recompute_activations, learning))
        require(blocks > 0, "config.gradient_checkpointing", "false (these networks have no blocks)", True)
    if config.compile:
        parts = compile_networks(learning, config.compile)
        require(parts > 0, "config.compile", "nothing (no part of these networks can be compiled)", config.compile)
    state.enter(0)
    return state


def _check_counter(name: str, value: Any) -> None:
    """Refuse a counter that no run can have: a checkpoint may come from somebody else."""
    where = f"checkpoint: {name}"
    if name in ("step", "stage", "stage_step", "samples"):
        require(_is_count(value), where, "a whole number from 0", value)
    elif name == "best":
        require(value is None or _is_number(value), where, "a number", value)
    elif name == "reported":
        pairs = value.values() if isinstance(value, dict) else [value]
        right = all(isinstance(pair, (list, tuple)) and len(pair) == 2 for pair in pairs)
        right = right and all(_is_number(total, math.inf) and _is_count(count) for total, count in pairs)
        require(right, where, "sums and numbers of values", value)
    elif name == "skipped":
        right = isinstance(value, dict) and all(_is_number(count) and count >= 0 for count in value.values())
        require(right, where, "numbers of inputs by cause", value)
    else:
        require(_is_number(value) and value >= 0, where, "seconds from 0", value)


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 <= value < 1 << 62


def _is_number(value: Any, largest: float = 1e300) -> bool:
    return type(value) in (int, float) and (abs(value) <= largest or largest == math.inf)
