"""Two tasks in one call each: a text about an image, and an image from a text."""

from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import torch
from PIL import Image

from tokenizers_mm._check import fail, require
from tokenizers_mm.llm.batch import Segment
from tokenizers_mm.llm.generate import GenerationSettings, Sampling, generate
from tokenizers_mm.llm.grammar import Grammar
from tokenizers_mm.llm.processor import MultimodalProcessor
from tokenizers_mm.llm.projector import FeatureProjector
from tokenizers_mm.llm.transformers_api import end_tokens, unwrap
from tokenizers_mm.llm.vocabulary import FILE

LIKELIEST = GenerationSettings(max_new_tokens=128, sampling=Sampling(temperature=0))
"""Text that takes the most likely token each time."""

_found: "WeakKeyDictionary[Any, MultimodalProcessor]" = WeakKeyDictionary()


def processor_of(model: Any) -> MultimodalProcessor:
    """The processor that was saved in the folder a model was loaded from, with its image tokenizer in `tokenizer`.

    It is read once for each model. Raises ValueError where the model is from another place.
    """
    inner = unwrap(model)
    if inner not in _found:
        folder = Path(str(inner.name_or_path))
        if not (folder / FILE).is_file():
            fail("processor", f"one, or a model of a folder in which one is saved ({FILE})", f"a model of {folder}")
        _found[inner] = MultimodalProcessor.from_pretrained(folder)
    return _found[inner]


def describe(
    model: Any,
    image: object,
    question: str = "",
    *,
    processor: MultimodalProcessor | None = None,
    projector: FeatureProjector | None = None,
    settings: GenerationSettings = LIKELIEST,
) -> str:
    """Text that the model says after an image and a question, without the prompt.

    image: as in a `Segment`. question: written after the image as it is, chat frames included. processor: None takes
    `processor_of(model)`. projector: shows the image as features; without one it is shown as ids.

    Raises: ValueError for a text in the place of the image; the path of one is a `Path`.
    """
    require(not isinstance(image, str), "image", "a Path, a PIL image, a tensor [3, H, W] or codes of one image", image)
    processor = processor_of(model) if processor is None else processor
    shown = Segment(image, learn=False, as_features=projector is not None)
    prompts = processor([[shown, question] if question else [shown]], end=False, side="left")
    grammar = Grammar(processor.vocabulary, "text", _ends(model, processor))
    ids = generate(model, prompts, grammar, settings, projector=projector)
    return "".join(processor.decode(ids, prompts=prompts)[0]).strip()


def draw(
    model: Any,
    caption: str,
    size: tuple[int, int] | None = None,
    *,
    processor: MultimodalProcessor | None = None,
    settings: GenerationSettings | None = None,
    generator: torch.Generator | None = None,
) -> Image.Image:
    """An image that the model draws from a caption.

    caption: written before the image as it is, chat frames included. size: (height, width) in pixels; None lets the
    model choose among the vocabulary's. processor: None takes `processor_of(model)`. settings: with guidance, the
    unconditional rows are an image without caption.

    Raises: ValueError for an unknown size, and where neither text tokenizer nor model names an end token.
    """
    processor = processor_of(model) if processor is None else processor
    opening = processor.opening(*size) if size is not None else processor.opening()
    prompts, empty = (processor([row], end=False, side="left") for row in ([caption, opening], ["", opening]))
    ends = _ends(model, processor)
    if not ends:
        fail("processor", "a text tokenizer with an end token, or a model that names one", "neither")
    grammar = Grammar(processor.vocabulary, "image", ends)
    ids = generate(model, prompts, grammar, settings, unconditional=empty, generator=generator)
    return next(part for part in processor.decode(ids, prompts=prompts)[0] if isinstance(part, Image.Image))


def _ends(model: Any, processor: MultimodalProcessor) -> list[int]:
    """The end token of the text tokenizer; those that the model names where it has none."""
    return list(end_tokens(model)) if processor.eos is None else [processor.eos]
