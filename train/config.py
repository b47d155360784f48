"""The configuration of a run: one complete file, every key of which is a field of a dataclass.

`RunConfig` holds the keys that all runs share; `objective: {kind: ...}` holds the rest, with the class of its kind.
"""

import dataclasses
import importlib
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from tokenizers_mm._check import fail, require
from tokenizers_mm.config import Range, from_mapping, read_yaml
from tokenizers_mm.registry import OBJECTIVES as REGISTERED

OBJECTIVES = {
    "reconstruction": ("reconstruction", "Reconstruction"),
    "mar": ("mar", "MARTraining"),
    "language": ("language", "Language"),
    "joint": ("joint", "Joint"),
}
"""Module of `train.objectives` and class of every kind."""

_WITHIN = [
    "model", "data", "loss", "optimizer", "discriminator_optimizer", "noise", "scale_drop", "trainable", "tokenizer",
    "language_model", "records", "fit", "mask_token", "learns", "lora_rank", "projector", "features", "pack",
    "start_from", "captions", "autoencoder", "sampling", "posterior", "drop", "scenes",
]  # fmt: skip

MOVED = {
    **{key: f"objective.{key}" for key in _WITHIN},
    "image_size": "objective.data.image_size",
    "upkeep": "objective.revival",
    "joint": "objective (kind: joint), key by key",
}
"""Keys of older files and their places now."""

RENAMED = {
    "objective.model.fresh": "objective.model.reinit",
    "objective.loss.captions": "objective.loss.text_encoder",
    "objective.loss.semantic: captions": "objective.loss.semantic: contrastive",
}
"""Keys inside an objective, and values, by their former names."""


@dataclass(frozen=True)
class RunConfig:
    """A run.

    out: folder of the run. objective: {kind: reconstruction | mar | language | joint, ...}, see `train.objectives`.
    steps: optimizer steps of all stages together; 0 for `joint`, whose stages say it. max_seconds: end the last stage,
    and finish its schedule, when it took this long; 0 for never.
    batch_size: samples of a micro-batch of one process. accumulate: micro-batches per step; they train as one large
    batch, but for what compares the samples of a micro-batch (entropy, contrast of captions, batch norm, the adaptive
    weight) and for the draws of dropout. precision: of autocast; fp16, with a gradient scaler, on CUDA alone.
    device: "auto" takes an accelerator where there is one.
    engine: of several processes: "ddp" keeps all weights on each, "fsdp" shards weights, gradients and moments.
    compile: backend of torch.compile for encoders, decoders and language models, "" for none.
    gradient_checkpointing: compute the activations of blocks again in the backward pass instead of keeping them.
    ema: decay of the moving average of weights that is saved, 0 for none. non_finite: "stop" ends the run at a gradient
    that is not finite, "skip" leaves the step out; fp16's scaler leaves such steps out, and "stop" ends the run when a
    scale below 1 did not help.
    trackers: accelerate's trackers beside log.jsonl: "tensorboard", "wandb", "trackio".
    log_every, sample_every, validate_every, save_every: in steps, 0 for never (but for the first). keep: number of
    checkpoints. async_save: write them while training goes on, from a copy in memory. best: the measurement of the
    validation by which the best networks are kept, in `out/best`; "" keeps none.
    resume: "auto" continues from the newest whole checkpoint in `out`, "never" starts from step 0.
    """

    out: str
    objective: Any
    steps: Annotated[int, Range(0)] = 0
    max_seconds: Annotated[float, Range(0)] = 0.0
    batch_size: Annotated[int, Range(1)] = 8
    accumulate: Annotated[int, Range(1)] = 1
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    device: str = "auto"
    engine: Literal["ddp", "fsdp"] = "ddp"
    compile: Literal["", "inductor", "aot_eager", "eager"] = ""
    gradient_checkpointing: bool = False
    ema: Annotated[float, Range(0, 1, high_open=True)] = 0.0
    non_finite: Literal["stop", "skip"] = "stop"
    seed: Annotated[int, Range(0, 2**62)] = 0
    trackers: tuple[Literal["tensorboard", "wandb", "trackio"], ...] = ()
    log_every: Annotated[int, Range(1)] = 10
    sample_every: Annotated[int, Range(0)] = 0
    validate_every: Annotated[int, Range(0)] = 0
    best: str = ""
    save_every: Annotated[int, Range(0)] = 1000
    keep: Annotated[int, Range(1)] = 2
    async_save: bool = False
    resume: Literal["auto", "never"] = "auto"


HARMLESS = frozenset([
    "out", "trackers", "log_every", "sample_every", "save_every", "keep", "async_save", "resume", "device", "engine",
    "compile", "gradient_checkpointing", "non_finite", "objective.data.workers",
])  # fmt: skip
"""Keys that change nothing that is learned."""


def objective_class(kind: Any) -> Any:
    """Class of a kind of objective; its module is imported now (`language` and `joint` need transformers)."""
    if isinstance(kind, str) and kind in REGISTERED:
        return REGISTERED[kind]
    if not isinstance(kind, str) or kind not in OBJECTIVES:
        fail("config.objective.kind", f"one of {sorted([*OBJECTIVES, *REGISTERED])}", kind)
    module, name = OBJECTIVES[kind]
    return getattr(importlib.import_module(f".objectives.{module}", __package__), name)


def read_config(path: str, overrides: list[str]) -> RunConfig:
    """Configuration of a file with `key=value` overrides, checked as far as that is possible without building."""
    return parse_config(read_yaml(path, overrides))


def parse_config(data: dict[str, Any]) -> RunConfig:
    """Configuration from a plain mapping; keys of older files are refused with their new names."""
    for key in data:
        if key in MOVED:
            raise ValueError(f"config.{key}: expected as config.{MOVED[key]}, got the place of an older version")
    for before, now in RENAMED.items():
        path, _, value = before.partition(": ")
        found: Any = data
        for key in path.split("."):
            found = found.get(key) if isinstance(found, dict) else None
        if found is not None and (not value or found == value):
            raise ValueError(f"config.{before}: expected as config.{now}, got the name of an older version")
    objective = data.get("objective")
    if isinstance(objective, str):
        fail("config.objective", f"a mapping {{kind: language, method: {objective}, ...}}", objective)
    config = from_mapping(RunConfig, data, "config")
    if not isinstance(objective, dict):
        fail("config.objective", "a mapping with a kind", "another value")
    kind = objective_class(objective.get("kind"))
    config = dataclasses.replace(config, objective=from_mapping(kind.Config, objective, "config.objective"))
    measured = bool(kind.MEASURES)
    require(not config.validate_every or measured, "config.validate_every", f"0 (kind: {kind.kind})", "a number")
    known = config.best in kind.MEASURES and config.validate_every > 0
    require(not config.best or known, "config.best", f"one of {list(kind.MEASURES)}, with validate_every", config.best)
    require(not config.sample_every or kind.SHOWS, "config.sample_every", f"0 (kind: {kind.kind})", "a number")
    require(not config.ema or bool(kind.AVERAGED), "config.ema", f"0 (kind: {config.objective.kind})", config.ema)
    scaled = config.engine == "fsdp" and config.precision == "fp16"
    require(not scaled, "config.precision", "fp32 or bf16 for engine: fsdp", config.precision)
    stages = kind.stages_of(config)
    for index, stage in enumerate(stages):
        require(stage.steps >= 1, "config.steps", f"at least 1 step in stage {index} ({stage.name})", config.steps)
    kind.check_config(config)
    return config
