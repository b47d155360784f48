"""Tests of the demo's language model: it is asked about held-out scenes and draws held-out captions."""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from tokenizers_mm._files import atomic_path
from tokenizers_mm._images import image_to_tensor
from tokenizers_mm.data.scenes import Scene, make_scene
from tokenizers_mm.eval.pictures import write_pictures
from tokenizers_mm.eval.scenes import judge_scene
from tokenizers_mm.llm import ImageFeatures, Segment
from tokenizers_mm.llm.loss import caption_rewards
from tokenizers_mm.llm.next_scale import NextScaleGenerator, ScaleSampling
from tokenizers_mm.models import ImageTokenizer
from tokenizers_mm.types import ImageCodes

from .language_model import COLOUR, SHAPE, TELL, Bridge, Lessons, make_lessons

NUM_HELDOUT, SHOWN, TOGETHER = 200, 16, 10
CANDIDATES = 4
"""Pictures drawn for each caption; the one about which the model itself best answers what was asked for is shown."""

HELDOUT = 1 << 31
"""Held-out scenes from here on, apart from those that the probes of the first half use."""

SAMPLING = ScaleSampling(steps=((0, 0.5),), guidance=2.0)


@dataclass(frozen=True)
class Drawing:
    """For a caption: the first picture drawn, the chosen one (None where a sequence is no image), how many parsed."""

    first: Image.Image | None
    chosen: Image.Image | None
    parsed: int


def measure_language_model(bridge: Bridge, tokenizer: ImageTokenizer[Any], out: Path) -> dict[str, Any]:
    """Ask about held-out scenes and draw held-out captions; leaves understanding.md and generation.png in `out`."""
    heldout = [make_scene(HELDOUT + index, "heldout") for index in range(NUM_HELDOUT)]
    answers = understand(bridge, make_lessons(tokenizer, heldout))
    drawings = draw(bridge, heldout)
    write_understanding(out / "understanding.md", heldout, answers)
    chosen = [(d.chosen, scene.caption) for d, scene in zip(drawings, heldout, strict=True)]
    write_pictures(out / "generation.png", [(p, text) for p, text in chosen if p is not None][:SHOWN])
    return {
        "understanding_accuracy": _share(answer == right for row in answers for answer, right in row[:2]),
        "understanding_colour": _share(row[0][0] == row[0][1] for row in answers),
        "understanding_shape": _share(row[1][0] == row[1][1] for row in answers),
        "generation_accuracy": _share(_right(d.chosen, s) for d, s in zip(drawings, heldout, strict=True)),
        "generation_accuracy_first": _share(_right(d.first, s) for d, s in zip(drawings, heldout, strict=True)),
        "generation_real": _share(_right(s.render(bridge.size[0]), s) for s in heldout),
        "parse_rate": sum(d.parsed for d in drawings) / (CANDIDATES * len(drawings)),
    }


@torch.no_grad()
def understand(bridge: Bridge, lessons: Lessons) -> list[list[tuple[str, str]]]:
    """For each scene the answer and what is right, for colour, shape and description."""
    columns = []
    for question, length in ((COLOUR, 1), (SHAPE, 1), (TELL, 40)):
        told: list[str] = []
        for chunk in _chunks(list(range(len(lessons.scenes))), 50):
            given = bridge.telling([[lessons.shown(i), question] for i in chunk], side="left", end=False)
            told += say(bridge, given, length)
        columns.append(told)
    expected = [(s.objects[0].colour, s.objects[0].shape, s.caption) for s in lessons.scenes]
    return [list(zip(row, want, strict=True)) for row, want in zip(zip(*columns, strict=True), expected, strict=True)]


def say(bridge: Bridge, given: dict[str, Tensor], length: int) -> list[str]:
    """The most likely text after prompts of one length, of so many tokens at most."""
    given = {name: value for name, value in given.items() if name not in ("labels", "position_ids")}
    processor, text_size = bridge.processor, bridge.processor.vocabulary.text_size
    ids = bridge.model.generate(
        **given,
        max_new_tokens=length,
        do_sample=False,
        suppress_tokens=list(range(text_size, processor.vocabulary.size)),
        pad_token_id=processor.pad,
        eos_token_id=processor.eos,
    )
    return processor.text_tokenizer.batch_decode(ids, skip_special_tokens=True)


@torch.no_grad()
def draw(bridge: Bridge, scenes: list[Scene]) -> list[Drawing]:
    """Several pictures for each caption, of which the model chooses one: it does not see the scenes' own pictures."""
    generator = torch.Generator().manual_seed(0)
    drawings = []
    for chunk in _chunks(scenes, TOGETHER):
        wanted = [scene for scene in chunk for _ in range(CANDIDATES)]
        pictures = draw_each(bridge, [scene.caption for scene in wanted], generator)
        rewards = reward_each(bridge, pictures, wanted)
        for start in range(0, len(wanted), CANDIDATES):
            several = pictures[start : start + CANDIDATES]
            best = max(range(CANDIDATES), key=rewards[start : start + CANDIDATES].__getitem__)
            drawings.append(Drawing(several[0], several[best], sum(p is not None for p in several)))
    return drawings


def draw_each(bridge: Bridge, captions: list[str], generator: torch.Generator) -> list[Image.Image | None]:
    """A picture for each caption, or None where the sequence of prompt and codes is no image."""
    processor = bridge.processor
    (height, width), vocabulary, size = bridge.size, processor.vocabulary, bridge.codes.shape[0]
    drawer = NextScaleGenerator(bridge.model, bridge.scales, bridge.codes.__getitem__, bridge.first_id, size)
    ids = drawer(bridge.prompts(captions), bridge.prompts([""] * len(captions)), SAMPLING, generator)
    tokens = vocabulary.to_tokens(ImageCodes(ids, height, width, processor.tokenizer.streams(height, width)))
    rows = processor.decode(tokens, malformed="skip")
    return [next((item for item in row if isinstance(item, Image.Image)), None) for row in rows]


def reward_each(bridge: Bridge, pictures: list[Image.Image | None], scenes: list[Scene]) -> list[float]:
    """Certainty of the model, looking at each picture, of the colour and shape asked for; -1 for no picture."""
    tokenizer = bridge.processor.tokenizer
    found = [(picture, scene) for picture, scene in zip(pictures, scenes, strict=True) if picture is not None]
    if not found:
        return [-1.0] * len(pictures)
    features = tokenizer.features(torch.stack([image_to_tensor(picture) for picture, _ in found]))
    rows = []
    for shown, (_, scene) in zip(features, found, strict=True):
        image = Segment(ImageFeatures((shown,), *bridge.size), learn=False, as_features=True)
        colour, shape = scene.objects[0].colour, scene.objects[0].shape
        rows.append([image, Segment(COLOUR, learn=False), colour, Segment(SHAPE, learn=False), shape])
    rewards = iter(caption_rewards(bridge.model, bridge.telling(rows, end=False)).tolist())
    return [-1.0 if picture is None else next(rewards) for picture in pictures]


def write_understanding(path: Path, scenes: list[Scene], answers: list[list[tuple[str, str]]]) -> None:
    """A table of questions and answers."""
    lines = [
        "# What the model says about scenes it never saw",
        "",
        "| scene | colour | shape | description |",
        "|---|---|---|---|",
    ]
    for scene, row in zip(scenes[:SHOWN], answers[:SHOWN], strict=True):
        lines.append("| " + " | ".join([scene.caption, *(answer for answer, _ in row)]) + " |")
    with atomic_path(path) as temporary:
        temporary.write_text("\n".join(lines) + "\n", encoding="utf-8")


def _right(picture: Image.Image | None, scene: Scene) -> bool:
    return picture is not None and judge_scene(picture) == (scene.objects[0].shape, scene.objects[0].colour)


def _share(hits: Iterable[bool]) -> float:
    found = list(hits)
    return sum(found) / len(found)


def _chunks(items: list[Any], size: int) -> Iterable[list[Any]]:
    return (items[start : start + size] for start in range(0, len(items), size))
