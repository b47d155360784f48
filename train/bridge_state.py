"""All that changes during a bridge run, how it is built, its step, and what it leaves."""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from tokenizers_mm._check import require
from tokenizers_mm._files import atomic_directory
from tokenizers_mm.llm import Batch, FeatureProjector, MultimodalProcessor, OnlyNewRows, ProjectorConfig
from tokenizers_mm.llm.batch import IGNORED
from tokenizers_mm.llm.diffuse import diffusion_loss
from tokenizers_mm.llm.loss import next_token_loss, num_predicted
from tokenizers_mm.llm.model import add_lora
from tokenizers_mm.llm.projector import embed
from tokenizers_mm.llm.transformers_api import embeddings

from .bridge_config import BridgeConfig
from .descent import descend
from .ranks import sum_counts
from .schedule import learning_rate
from .state import adam


class Learning:
    """The weights that learn, by name: a checkpoint holds these and not the frozen ones."""

    def __init__(self, *modules: tuple[str, Any]) -> None:
        named = [(f"{name}.{key}", p) for name, module in modules for key, p in module.named_parameters()]
        self.parameters = {key: p for key, p in named if p.requires_grad}

    def state_dict(self) -> dict[str, Tensor]:
        """The weights."""
        return {name: parameter.detach() for name, parameter in self.parameters.items()}

    @torch.no_grad()
    def load_state_dict(self, tensors: dict[str, Tensor]) -> None:
        """Put them back; names and shapes must be these."""
        shapes = [{name: tuple(t.shape) for name, t in group.items()} for group in (self.parameters, tensors)]
        other = sorted(
            name for name in shapes[0].keys() | shapes[1].keys() if shapes[0].get(name) != shapes[1].get(name)
        )
        if other:
            raise ValueError(f"another {other[0]}")
        for name, parameter in self.parameters.items():
            parameter.copy_(tensors[name])


@dataclass
class BridgeState:
    """The language model (with adapters where they learn), projector, optimizer and counters of a run.

    rows: of the mixture that all ranks have used so far. mask_id: of masked diffusion, None for next-token prediction.
    """

    config: BridgeConfig
    accelerator: Accelerator
    model: Any
    processor: MultimodalProcessor
    projector: FeatureProjector | None
    mask_id: int | None
    learning: Learning
    optimizer: torch.optim.Optimizer
    step: int = 0
    seconds: float = 0.0
    rows: int = 0

    def parts(self) -> dict[str, Any]:
        """All things with a state_dict, by name."""
        scaler = getattr(self.accelerator, "scaler", None)
        things = {"learning": self.learning, "optimizer": self.optimizer}
        return things if scaler is None else {**things, "scaler": scaler}

    def values(self) -> dict[str, Any]:
        """All else that changes. Chance is not in it: the seed, the step and the rank decide that."""
        return {"rows": self.rows}

    def set_values(self, values: dict[str, Any]) -> None:
        """Put them back."""
        self.rows = values["rows"]


def build_bridge_state(
    config: BridgeConfig, accelerator: Accelerator, model: Any, processor: MultimodalProcessor
) -> BridgeState:
    """A run at its start, on the accelerator's device."""
    device, text = accelerator.device, processor.text_tokenizer
    mask_id = None
    if config.objective == "masked_diffusion":
        mask_id = text.convert_tokens_to_ids(config.mask_token)
        known = mask_id is not None and mask_id != text.unk_token_id
        require(known, "mask_token", "a token of the text tokenizer", config.mask_token)
    projector = None
    if config.projector != "none":
        width = embeddings(model).weight.shape[1]
        projector = FeatureProjector(ProjectorConfig(processor.feature_dims(), width, config.projector)).to(device)
    if config.learns == "lora":
        model = add_lora(model, processor.vocabulary, config.lora_rank)
    elif config.learns == "new_rows":
        OnlyNewRows(model, processor.vocabulary)
    model = model.to(device).train()
    learning = Learning(("model", model), *([("projector", projector)] if projector is not None else []))
    optimizer = adam(list(learning.parameters.values()), config.optimizer)
    return BridgeState(config, accelerator, model, processor, projector, mask_id, learning, optimizer)


def bridge_step(state: BridgeState, batches: Sequence[Batch], progress: float) -> dict[str, float]:
    """One step down the mean over all micro-batches of all ranks, each weighed by its labels; returns what to report.

    So neither the number of processes nor that of micro-batches changes what is learned from the same rows.
    """
    config, accelerator = state.config, state.accelerator
    rate = learning_rate(config.optimizer, state.step, progress)
    generator = _chance(config.seed, state.step, accelerator.process_index)
    weights = [_weight(state, batch) for batch in batches]
    labels = sum(int((batch.labels != IGNORED).sum()) for batch in batches)
    total, labels = sum_counts(torch.tensor([sum(weights), labels], device=accelerator.device)).tolist()
    require(
        labels > 0, "records", "rows with something to learn (parts without learn: false)", f"none in step {state.step}"
    )
    loss = torch.zeros(1, dtype=torch.float64, device=accelerator.device)
    for batch, weight in zip(batches, weights, strict=True):
        with accelerator.autocast():
            term = _loss(state, batch.to(accelerator.device), generator) * (weight / max(total, 1))
            accelerator.backward(term * accelerator.num_processes)  # the ranks' gradients are averaged
        loss += term.detach()
    scaler = getattr(accelerator, "scaler", None)
    norm = descend(state.optimizer, rate, config.optimizer.clip, state.step, scaler)
    state.step += 1
    state.rows += config.batch_size * len(batches) * accelerator.num_processes
    return {"loss": float(sum_counts(loss)), "labels": float(labels), "grad_norm": norm, "lr": rate}


def save_finished(state: BridgeState) -> None:
    """Write the model (adapters merged), text tokenizer, visual_vocab.json and projector to the run's folder."""
    model = state.model.merge_and_unload() if state.config.learns == "lora" else state.model
    with atomic_directory(Path(state.config.out)) as folder:
        model.eval().save_pretrained(folder)
        state.processor.save(folder)
        if state.projector is not None:
            state.projector.save(folder)


def _loss(state: BridgeState, batch: Batch, generator: torch.Generator) -> Tensor:
    """The objective of a batch, a mean over what `_weight` counts."""
    if state.mask_id is not None:
        return diffusion_loss(state.model, batch, state.mask_id, generator)
    if state.projector is None:
        return next_token_loss(state.model, batch.model_inputs())
    return next_token_loss(state.model, embed(state.model, batch, state.projector))


def _weight(state: BridgeState, batch: Batch) -> int:
    """Labels, or for masked diffusion, which weighs sequences alike, sequences."""
    return num_predicted(batch.labels) if state.mask_id is None else len(batch)


def _chance(seed: int, step: int, rank: int) -> torch.Generator:
    """The generator of a step of a rank; dropout is seeded with it too. So a run goes on as if it never stopped."""
    number = random.Random(f"{seed} {step} {rank}").getrandbits(63)
    torch.manual_seed(number)
    return torch.Generator().manual_seed(number)
