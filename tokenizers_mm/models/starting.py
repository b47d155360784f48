"""A tokenizer to begin with: random weights, timm's published towers, or a saved tokenizer, wholly or in part."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from tokenizers_mm._check import require
from tokenizers_mm.config import from_mapping
from tokenizers_mm.encoders.semantic import SemanticEncoder
from tokenizers_mm.encoders.vision_model import VisionModel
from tokenizers_mm.models import MODELS, ImageTokenizer
from tokenizers_mm.models.loading import load
from tokenizers_mm.models.weights import copy_weights


@dataclass(frozen=True)
class ModelConfig:
    """The tokenizer: its family and the family's own configuration, or a saved tokenizer to continue from.

    family: name in the table of families. config: the family's own configuration. start_from: directory or hub id of a
    saved tokenizer, "" for none; beside a config, which says what is built, it gives the weights. reinit: beginnings of
    the names of parameters that are initialized anew in that case (another decoder on frozen codes).
    """

    family: str = ""
    config: dict[str, Any] = field(default_factory=dict)
    start_from: str = ""
    reinit: tuple[str, ...] = ()


def check_model(model: ModelConfig, where: str) -> None:
    """Refuse an unknown family, and values that do not go together. where: how errors call the configuration."""
    if model.config or not model.start_from:
        require(model.family in MODELS, f"{where}.family", f"one of {sorted(MODELS)}", repr(model.family))
        parse_model(model, where)
    else:
        require(not model.family, f"{where}.family", "nothing without a config (start_from says it)", model.family)
    both = bool(model.config and model.start_from)
    require(both or not model.reinit, f"{where}.reinit", "a config and a start_from beside it", "one of them alone")


def parse_model(model: ModelConfig, where: str = "model") -> Any:
    """The family's own configuration, checked."""
    return from_mapping(MODELS[model.family].Config, model.config, f"{where}.config")


def on_meta(model: ModelConfig) -> ImageTokenizer[Any]:
    """The tokenizer of a configuration without memory for its weights."""
    with torch.device("meta"):
        return MODELS[model.family].from_config(parse_model(model))


def model_size(model: ModelConfig) -> int | str:
    """Number of parameters, without memory for them; or where they are, if that is not on this machine."""
    if model.config or not model.start_from:
        return sum(p.numel() for p in on_meta(model).parameters())
    return saved_size(model.start_from)


def saved_size(source: str) -> int | str:
    """Number of parameters of a saved tokenizer, where it is on this machine."""
    if not Path(source).is_dir():
        return f"the tokenizer {source}, which is not on this machine"
    return sum(p.numel() for p in load(source).parameters())


def build_tokenizer(model: ModelConfig, where: str = "model") -> ImageTokenizer[Any]:
    """The tokenizer with its weights. where: how errors call the configuration."""
    if model.start_from and not model.config:
        return load(model.start_from)
    tokenizer = MODELS[model.family].from_config(parse_model(model, where))
    if model.start_from:
        copy_weights(load(model.start_from), tokenizer, model.reinit, f"{where}.start_from")
    for module in tokenizer.modules():
        if isinstance(module, (SemanticEncoder, VisionModel)) and module.config.pretrained and not model.start_from:
            module.load_pretrained()
    return tokenizer
