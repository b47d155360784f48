"""The demo's second half: a small language model learns to tell what it sees in scenes and to draw from captions."""

import itertools
import random
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

from tokenizers_mm._files import atomic_path
from tokenizers_mm._images import image_to_tensor
from tokenizers_mm.data.scenes import COLOURS, COLUMNS, GROUNDS, ROWS, SHAPES, Scene, make_scene
from tokenizers_mm.eval.pictures import write_pictures
from tokenizers_mm.eval.scenes import judge_scene
from tokenizers_mm.llm import (
    Batch,
    GenerationSettings,
    Grammar,
    MultimodalProcessor,
    Sampling,
    Segment,
    VisualVocabulary,
    extend,
    generate,
)
from tokenizers_mm.llm.batch import pad_rows
from tokenizers_mm.models import ImageTokenizer
from tokenizers_mm.types import ImageCodes

from .bridge import FitConfig, fit
from .config import OptimizerConfig

WIDTH, DEPTH, HEADS = 128, 4, 4
NUM_SCENES, NUM_HELDOUT, SHOWN = 8000, 200, 16
BATCH, CHUNK = 32, 50
COLOUR, SHAPE, TELL, DRAW = "what colour ?", "what shape ?", "describe :", "draw :"
HELDOUT = 1 << 31
"""Held-out scenes from here on, apart from those that the probes of the first half use."""


def bridge_demo(tokenizer: ImageTokenizer[Any], out: Path, seconds: float) -> dict[str, Any]:
    """Train for so many seconds, ask and draw; leaves the model, understanding.md and generation.png in `out`."""
    torch.manual_seed(0)
    side = (tokenizer.image_size or (64, 64))[0]
    processor = make_processor(tokenizer)
    model = make_model(tokenizer, processor)
    scenes = [make_scene(index) for index in range(NUM_SCENES)]
    codes = encode_scenes(tokenizer, scenes, side)
    rng, turn = random.Random(0), itertools.count()

    def next_batch() -> Batch:
        """The directions take turns, so that a few words of an answer weigh as much as the many codes of a picture."""
        row = drawing_row if next(turn) % 2 else telling_row
        chosen = [rng.randrange(NUM_SCENES) for _ in range(BATCH)]
        rows = [row(scenes[i], codes[i], rng) for i in chosen]
        return pad_rows(processor.rows(rows), processor.pad)

    options = OptimizerConfig(lr=2e-3, betas=(0.9, 0.98), weight_decay=0.01, schedule="cosine", warmup=40, clip=1.0)
    fitting = FitConfig(options, steps=100_000, max_seconds=seconds)
    last = fit(list(model.train().parameters()), lambda: model(**next_batch().model_inputs()).loss, fitting, print)
    model.eval()
    model.save_pretrained(out / "language_model")
    processor.save(out / "language_model")

    heldout = [make_scene(HELDOUT + index, "heldout") for index in range(NUM_HELDOUT)]
    answers = understand(model, processor, heldout, encode_scenes(tokenizer, heldout, side))
    pictures = draw(model, processor, [scene.caption for scene in heldout])
    right = [
        picture is not None and judge_scene(picture) == (scene.objects[0].shape, scene.objects[0].colour)
        for picture, scene in zip(pictures, heldout, strict=True)
    ]
    write_understanding(out / "understanding.md", heldout, answers)
    drawn = [(picture, scene.caption) for picture, scene in zip(pictures, heldout, strict=True) if picture is not None]
    write_pictures(out / "generation.png", drawn[:SHOWN])
    exact = [answer == expected for row in answers for answer, expected in row[:2]]
    return {
        "understanding_accuracy": sum(exact) / len(exact),
        "generation_accuracy": sum(right) / len(right),
        "parse_rate": sum(picture is not None for picture in pictures) / len(pictures),
        "bridge_seconds": last.get("seconds", 0.0),
        "bridge_steps": last.get("step", 0),
    }


def make_processor(tokenizer: ImageTokenizer[Any]) -> MultimodalProcessor:
    """A word-level text tokenizer for scenes, and the ids for images behind it."""
    texts = [COLOUR, SHAPE, TELL, DRAW, *SHAPES, *COLOURS, *GROUNDS, *ROWS, *COLUMNS, "a and at the on large small"]
    words = ["<pad>", "<unk>", "<eos>", *dict.fromkeys(word for text in texts for word in text.split())]
    core = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    text = PreTrainedTokenizerFast(tokenizer_object=core, pad_token="<pad>", unk_token="<unk>", eos_token="<eos>")
    vocabulary = VisualVocabulary.for_tokenizer(tokenizer, text)
    return MultimodalProcessor(tokenizer, text, vocabulary, positions="slots")


def make_model(tokenizer: ImageTokenizer[Any], processor: MultimodalProcessor) -> Any:
    """A small decoder with learned positions; rows of codes begin as projections of the codes."""
    config = GPT2Config(
        vocab_size=processor.vocabulary.text_size,
        n_positions=processor.longest + 70,
        n_embd=WIDTH,
        n_layer=DEPTH,
        n_head=HEADS,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        eos_token_id=processor.eos,
        bos_token_id=processor.eos,
    )
    model = GPT2LMHeadModel(config)
    name = processor.vocabulary.codes[0].stream
    return extend(model, processor.vocabulary, codebooks={name: code_vectors(tokenizer)})


@torch.no_grad()
def code_vectors(tokenizer: ImageTokenizer[Any]) -> Tensor:
    """The vector of each code of a one-stream tokenizer: what an image of that code alone gives."""
    height, width = tokenizer.image_size or (64, 64)
    (stream,) = tokenizer.streams(height, width)
    rows, columns = stream.grids[0]
    ids = torch.arange(stream.codebook_size)[:, None].expand(-1, rows * columns)
    parts = [tokenizer.vectors(ImageCodes(part, height, width, (stream,))) for part in ids.split(512)]
    return torch.cat([part[:, 0, 0] for part in parts])


def encode_scenes(tokenizer: ImageTokenizer[Any], scenes: list[Scene], side: int) -> list[ImageCodes]:
    """The codes of each scene."""
    found: list[ImageCodes] = []
    for start in range(0, len(scenes), 64):
        x = torch.stack([image_to_tensor(scene.render(side)) for scene in scenes[start : start + 64]])
        codes = tokenizer.encode(x)
        assert isinstance(codes, ImageCodes)
        found += [ImageCodes(ids[None], codes.height, codes.width, codes.streams) for ids in codes.ids]
    return found


def drawing_row(scene: Scene, codes: ImageCodes, rng: random.Random) -> list[Any]:
    """A caption and its picture; one time in ten the picture alone, which guidance needs."""
    return [codes] if rng.random() < 0.1 else [Segment(f"{DRAW} {scene.caption}", learn=False), codes]


def telling_row(scene: Scene, codes: ImageCodes, rng: random.Random) -> list[Any]:
    """A picture and two questions about it, in any order; now and then its description."""
    largest = scene.objects[0]
    turns = [(COLOUR, largest.colour), (SHAPE, largest.shape)]
    turns += [(TELL, scene.caption)] if rng.random() < 0.3 else []
    rng.shuffle(turns)
    pairs = [(Segment(question, learn=False), answer) for question, answer in turns]
    return [Segment(codes, learn=False), *(part for pair in pairs for part in pair)]


def understand(
    model: Any, processor: MultimodalProcessor, scenes: list[Scene], codes: list[ImageCodes]
) -> list[list[tuple[str, str]]]:
    """For each scene the answer and what is right, for colour, shape and description."""
    grammar = Grammar(processor.vocabulary, "text", processor.eos)
    columns = []
    for question, length in ((COLOUR, 1), (SHAPE, 1), (TELL, 40)):
        told: list[str] = []
        for chunk in _chunks([[image, question] for image in codes]):
            prompts = processor(chunk, end=False, side="left")
            settings = GenerationSettings(length, Sampling(temperature=0))
            ids = generate(model, prompts, grammar, settings)
            told += ["".join(item for item in row if isinstance(item, str)) for row in processor.decode(ids)]
        columns.append(told)
    expected = [(s.objects[0].colour, s.objects[0].shape, s.caption) for s in scenes]
    return [list(zip(row, want, strict=True)) for row, want in zip(zip(*columns, strict=True), expected, strict=True)]


def draw(model: Any, processor: MultimodalProcessor, captions: list[str], guidance: float = 3.0) -> list[Any]:
    """A picture for each caption, or None where what was said is no image."""
    grammar = Grammar(processor.vocabulary, "image", processor.eos)
    settings = GenerationSettings(1, Sampling(temperature=0.7, top_p=0.95), guidance=guidance)
    pictures: list[Any] = []
    generator = torch.Generator().manual_seed(0)
    for chunk in _chunks([[f"{DRAW} {caption}", processor.opening()] for caption in captions]):
        prompts = processor(chunk, end=False, side="left")
        empty = processor([[processor.opening()]] * len(chunk), end=False, side="left")
        ids = generate(model, prompts, grammar, settings, unconditional=empty, generator=generator)
        rows = processor.decode(torch.cat([prompts.input_ids, ids], 1), malformed="skip")
        pictures += [next((item for item in row if isinstance(item, Image.Image)), None) for row in rows]
    return pictures


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


def _chunks(rows: list[Any]) -> Iterable[list[Any]]:
    return (rows[start : start + CHUNK] for start in range(0, len(rows), CHUNK))
