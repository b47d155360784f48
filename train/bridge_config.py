"""The configuration of a bridge run: one complete file, every key of it a field here."""

from dataclasses import dataclass, field
from typing import Any, Literal

from tokenizers_mm._check import require
from tokenizers_mm.config import from_mapping, read_yaml

from .config import OptimizerConfig

MAY_CHANGE = frozenset(["out", "steps", "max_seconds", "log_every", "save_every", "keep", "resume"])
"""Keys that need not be what they were when a run goes on."""


@dataclass(frozen=True)
class LanguageModelConfig:
    """source: a directory or hub id of a causal language model; or, without one, `kind` and `config` of a new one.

    text_tokenizer: a directory or hub id; by default that of the source. sizes: (height, width) of the images it is to
    know; by default those of `VisualVocabulary.for_tokenizer`. Weights are float32 whatever they are on disk.
    """

    source: str = ""
    text_tokenizer: str = ""
    kind: str = ""
    config: dict[str, Any] = field(default_factory=dict)
    sizes: tuple[tuple[int, int], ...] = ()


@dataclass(frozen=True)
class RecordConfig:
    """A file of interleaved records (see `tokenizers_mm.llm.records`) and its share of the rows.

    outside: whether its images may lie outside of its folder.
    """

    path: str
    weight: float = 1.0
    outside: bool = False


@dataclass(frozen=True)
class BridgeConfig:
    """A run.

    out: its folder. tokenizer: directory or hub id of the image tokenizer, which stays as it is. objective: next-token
    prediction, or masked diffusion with `mask_token` of the text tokenizer. learns: all weights, only the visual rows,
    or low-rank adapters (of `lora_rank`) and the visual rows.

    fit: what to do with pictures of a size that the vocabulary lacks. projector: the activation of the projector of
    features, where records show images as features. features: the tokenizer's own, or those of its streams as parts
    (DualViTok). pack: tokens per packed sequence, 0 to pad instead. batch_size: rows of a micro-batch of a process;
    accumulate: micro-batches per step. precision: of autocast. log_every, save_every: in steps, 0 saves nothing but the
    finished model; keep: checkpoints. resume: "auto" goes on from the newest checkpoint in `out`, "never" starts anew.
    """

    out: str
    tokenizer: str
    language_model: LanguageModelConfig
    records: tuple[RecordConfig, ...]
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    objective: Literal["next_token", "masked_diffusion"] = "next_token"
    mask_token: str = ""
    learns: Literal["all", "new_rows", "lora"] = "all"
    lora_rank: int = 16
    fit: Literal["refuse", "crop", "pad", "resize"] = "refuse"
    projector: Literal["none", "gelu", "silu"] = "none"
    features: Literal["tokenizer", "streams"] = "tokenizer"
    pack: int = 0
    steps: int = 1000
    max_seconds: float = 0.0
    batch_size: int = 8
    accumulate: int = 1
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    seed: int = 0
    log_every: int = 20
    save_every: int = 1000
    keep: int = 2
    resume: Literal["auto", "never"] = "auto"


def read_bridge_config(path: str, overrides: list[str]) -> BridgeConfig:
    """The configuration of a file with `key=value` overrides."""
    config = from_mapping(BridgeConfig, read_yaml(path, overrides), "config")
    for name in ("steps", "batch_size", "accumulate", "log_every", "keep", "lora_rank"):
        require(getattr(config, name) >= 1, f"config.{name}", "at least 1", getattr(config, name))
    frozen_decay = config.learns == "new_rows" and config.optimizer.weight_decay != 0
    require(not frozen_decay, "optimizer.weight_decay", "0 for learns: new_rows", config.optimizer.weight_decay)
    if config.objective == "masked_diffusion":
        require(config.projector == "none", "projector", "none for masked diffusion", config.projector)
        require(bool(config.mask_token), "mask_token", "a token of the text tokenizer", "nothing")
    return config
