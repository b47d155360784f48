"""A language model with room for images, from a configuration; and the files that a trained one leaves."""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from tokenizers_mm._check import require
from tokenizers_mm._files import atomic_directory
from tokenizers_mm._images import Fit
from tokenizers_mm.config import to_mapping
from tokenizers_mm.llm import FeatureProjector, MultimodalProcessor, VisualVocabulary, extend
from tokenizers_mm.llm.transformers_api import (
    load_language_model,
    load_text_tokenizer,
    new_language_model,
    num_parameters,
)


@dataclass(frozen=True)
class LanguageModelConfig:
    """source: a directory or hub id of a causal language model; or, without one, `kind` and `config` of a new one.

    text_tokenizer: a directory or hub id; by default that of the source. sizes: (height, width) of the images that the
    vocabulary covers; by default those of `VisualVocabulary.for_tokenizer`. any_tokenizer: whether a vocabulary that
    lies beside the text tokenizer may be one of another image tokenizer. Weights are float32 whatever they are on disk.
    """

    source: str = ""
    text_tokenizer: str = ""
    kind: str = ""
    config: dict[str, Any] = field(default_factory=dict)
    sizes: tuple[tuple[int, int], ...] = ()
    any_tokenizer: bool = False


def save_language_model(
    model: Any, processor: MultimodalProcessor, projector: FeatureProjector | None, folder: Path
) -> None:
    """Files that `AutoModelForCausalLM`, `AutoTokenizer`, `VisualVocabulary.load` and `FeatureProjector.load` read."""
    with atomic_directory(folder) as temporary:
        model.eval().save_pretrained(temporary)
        processor.save(temporary)
        if projector is not None:
            projector.save(temporary)


def language_model_size(config: LanguageModelConfig, where: str) -> int | str:
    """Number of parameters before rows for images are added, where it is known without a download."""
    if not config.kind and not Path(config.source).is_dir():
        return f"{config.source}, which is not on this machine"
    return num_parameters(config.kind, config.source, config.config, where)


def build_language_model(
    config: LanguageModelConfig,
    tokenizer: Any,
    where: str,
    fit: Fit = "refuse",
    features: Callable[[Any], Any] | None = None,
) -> tuple[Any, MultimodalProcessor]:
    """Model with room for images, and processor (with its `fit` and `features`).

    A vocabulary that lies beside the text tokenizer is kept. where: how errors call the configuration.
    """
    require(bool(config.source) != bool(config.kind), where, "either source or kind", to_mapping(config))
    named = config.text_tokenizer or config.source
    require(bool(named), f"{where}.text_tokenizer", "a directory or hub id", "nothing")
    text = load_text_tokenizer(named, f"{where}.text_tokenizer")
    if config.source:
        model = load_language_model(config.source, where, dtype=torch.float32)
    else:
        model = new_language_model(config.kind, where, {"vocab_size": len(text), **config.config})
    kept = (Path(named) / "visual_vocab.json").is_file()
    if kept:
        vocabulary = VisualVocabulary.load_for(tokenizer, named, config.any_tokenizer)
    else:
        vocabulary = VisualVocabulary.for_tokenizer(tokenizer, text, sizes=config.sizes or None)
    processor = MultimodalProcessor(
        tokenizer, text, vocabulary, fit, features=features, any_tokenizer=config.any_tokenizer
    )
    return extend(model, vocabulary), processor
