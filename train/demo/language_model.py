"""The demo's second half: a small language model learns to tell what it sees in scenes and to draw from captions.

It reads pictures as the features of their codes, and draws by next-scale prediction: TokenFlow's own two ways.
"""

import itertools
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

from tokenizers_mm._files import write_json
from tokenizers_mm.data.scenes import COLOURS, COLUMNS, GROUNDS, ROWS, SHAPES, Scene, make_scene, scene_images
from tokenizers_mm.llm import (
    FeatureProjector,
    ImageFeatures,
    MultimodalProcessor,
    ProjectorConfig,
    Segment,
    VisualVocabulary,
    extend,
    next_token_loss,
)
from tokenizers_mm.llm.batch import pad_rows
from tokenizers_mm.llm.next_scale import NextScaleInputs, next_scale_loss
from tokenizers_mm.llm.projector import embed
from tokenizers_mm.models import ImageTokenizer
from tokenizers_mm.models.saving import save_tensors
from tokenizers_mm.types import ImageCodes

from ..optim import OptimizerConfig, descend, learning_rate
from .muon import Muon
from .tokenizer import image_size

WIDTH, DEPTH, HEADS = 128, 4, 4
DRAWN, TOLD = 8, 8
"""Scenes in a step of drawing and in one of telling."""

TURNS = (*["draw"] * 5, "tell")
UNCAPTIONED = 0.1
"""Share of pictures that are drawn without a caption, which guidance needs."""

COLOUR, SHAPE, TELL, DRAW = "what colour ?", "what shape ?", "describe :", "draw :"
LONGEST = "a large red circle at the top left and " * 3 + "on grey"

MATRICES = OptimizerConfig(lr=2e-2, weight_decay=0.01, schedule="cosine", warmup=40, clip=1.0)
OTHERS = OptimizerConfig(lr=2e-3, betas=(0.9, 0.98), weight_decay=0.01, schedule="cosine", warmup=40, clip=1.0)


class Bridge(nn.Module):
    """The language model, and what stands between it and pictures.

    projector: of the features that it reads. scales: what it reads of the scales already drawn. codes: [K, D], the
    code vectors with mean 0 and spread 1 in every channel.
    """

    def __init__(self, tokenizer: ImageTokenizer[Any], processor: MultimodalProcessor) -> None:
        super().__init__()
        self.processor = processor
        self.size = image_size(tokenizer)
        (stream,) = tokenizer.streams(*self.size)
        vectors = code_vectors(tokenizer)
        self.codes = (vectors - vectors.mean(0)) / vectors.std(0)
        self.prefix = len(processor.rows([[f"{DRAW} {LONGEST}", processor.opening()]], end=False)[0])
        self.model: Any = make_model(processor, self.codes, 2 * self.prefix + stream.num_ids)
        self.projector = FeatureProjector(ProjectorConfig(processor.feature_dims(), WIDTH))
        self.scales = NextScaleInputs(stream.grids, self.codes.shape[1], WIDTH, self.prefix)
        self.first_id = processor.vocabulary.codes[0].start

    def prompts(self, captions: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Prompts of pictures, padded on the left to one length: ids and mask [B, P]; "" is no caption."""
        opening = self.processor.opening()
        rows = self.processor.rows([[f"{DRAW} {c}", opening] if c else [opening] for c in captions], end=False)
        batch = pad_rows(rows, self.processor.pad, "left", self.prefix)
        return batch.input_ids, batch.attention_mask.bool()

    def drawing_loss(self, captions: Sequence[str], ids: Tensor) -> Tensor:
        """Loss of the codes of pictures, int64 [B, L]."""
        return next_scale_loss(self.model, self.scales, self.prompts(captions), ids, self.codes[ids], self.first_id)

    def telling(self, rows: Sequence[Sequence[Any]], side: Any = "right", end: bool = True) -> dict[str, Tensor]:
        """Rows with pictures as features, as the model takes them."""
        return embed(self.model, self.processor(rows, end=end, side=side), self.projector)

    def save(self, folder: Path) -> None:
        """The model and its text tokenizer as `transformers` reads them; the projector and the scales beside them."""
        self.model.save_pretrained(folder)
        self.processor.save(folder)
        self.projector.save(folder)
        save_tensors(self.scales.state_dict(), folder / "scales.safetensors")


@dataclass(frozen=True)
class Lessons:
    """Scenes with their codes, int64 [N, L], and features, [N, T, C]."""

    scenes: list[Scene]
    ids: Tensor
    features: Tensor
    size: tuple[int, int]

    def shown(self, index: int) -> Segment:
        """A scene's picture as features."""
        return Segment(ImageFeatures((self.features[index],), *self.size), learn=False, as_features=True)


def teach(
    tokenizer: ImageTokenizer[Any], out: Path, steps: int, num_scenes: int, shown: Callable[[int], object] = print
) -> tuple[Bridge, dict[str, Any]]:
    """Train for `steps` steps on `num_scenes` scenes; leaves the model in `out/language_model`.

    shown: called with the number of steps done, after each.
    """
    torch.manual_seed(0)
    bridge = Bridge(tokenizer, make_processor(tokenizer))
    lessons = make_lessons(tokenizer, [make_scene(index) for index in range(num_scenes)])
    matrices = [p for p in bridge.model.transformer.h.parameters() if p.ndim == 2]
    others = [p for p in bridge.parameters() if not any(p is matrix for matrix in matrices)]
    optimizers = (
        (MATRICES, Muon(matrices, MATRICES.lr, MATRICES.weight_decay)),
        (OTHERS, torch.optim.AdamW(others, OTHERS.lr, OTHERS.betas, weight_decay=OTHERS.weight_decay)),
    )
    rng, turns, started = random.Random(0), itertools.cycle(TURNS), time.perf_counter()
    means: dict[str, float] = {}
    bridge.train()
    for step in range(steps):
        turn = next(turns)
        loss = draw_loss(bridge, lessons, rng) if turn == "draw" else tell_loss(bridge, lessons, rng)
        loss.backward()
        for options, optimizer in optimizers:
            descend(optimizer, learning_rate(options, step, step / steps), options.clip)
        means[turn] = means.get(turn, loss.item()) * 0.98 + loss.item() * 0.02
        shown(step + 1)
    bridge.eval().save(out / "language_model")
    report = {"bridge_seconds": time.perf_counter() - started, "bridge_steps": steps}
    write_json(out / "language_model" / "demo.json", report | {f"loss_{k}": v for k, v in means.items()})
    return bridge, report


def draw_loss(bridge: Bridge, lessons: Lessons, rng: random.Random) -> Tensor:
    """Captions and their pictures; now and then a picture alone."""
    chosen = [rng.randrange(len(lessons.scenes)) for _ in range(DRAWN)]
    captions = ["" if rng.random() < UNCAPTIONED else lessons.scenes[i].caption for i in chosen]
    return bridge.drawing_loss(captions, lessons.ids[chosen])


def tell_loss(bridge: Bridge, lessons: Lessons, rng: random.Random) -> Tensor:
    """Pictures, each with some of two questions and a description, in any order."""
    chosen = [rng.randrange(len(lessons.scenes)) for _ in range(TOLD)]
    rows = []
    for index in chosen:
        scene = lessons.scenes[index]
        largest = scene.objects[0]
        pairs = [(COLOUR, largest.colour), (SHAPE, largest.shape), (TELL, scene.caption)]
        rng.shuffle(pairs)
        told = [
            part for question, answer in pairs[: rng.randint(1, 3)] for part in (Segment(question, learn=False), answer)
        ]
        rows.append([lessons.shown(index), *told])
    return next_token_loss(bridge.model, bridge.telling(rows))


def make_processor(tokenizer: ImageTokenizer[Any]) -> MultimodalProcessor:
    """A word-level text tokenizer for scenes, and the ids for images behind it."""
    texts = [COLOUR, SHAPE, TELL, DRAW, *SHAPES, *COLOURS, *GROUNDS, *ROWS, *COLUMNS, "a and at the on large small"]
    words = ["<pad>", "<unk>", "<eos>", *dict.fromkeys(word for text in texts for word in text.split())]
    core = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    text = PreTrainedTokenizerFast(tokenizer_object=core, pad_token="<pad>", unk_token="<unk>", eos_token="<eos>")
    return MultimodalProcessor(tokenizer, text, VisualVocabulary.for_tokenizer(tokenizer, text))


def make_model(processor: MultimodalProcessor, codes: Tensor, positions: int) -> Any:
    """A small decoder with learned positions; its rows of codes begin as projections of the codes."""
    config = GPT2Config(
        vocab_size=processor.vocabulary.text_size,
        n_positions=positions,
        n_embd=WIDTH,
        n_layer=DEPTH,
        n_head=HEADS,
        activation_function="gelu_pytorch_tanh",  # one fused operation
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        eos_token_id=processor.eos,
        bos_token_id=processor.eos,
    )
    name = processor.vocabulary.codes[0].stream
    return extend(GPT2LMHeadModel(config), processor.vocabulary, codebooks={name: codes})


@torch.no_grad()
def code_vectors(tokenizer: ImageTokenizer[Any]) -> Tensor:
    """The vector [K, D] of each code of a one-stream tokenizer: what an image of that code alone gives."""
    height, width = image_size(tokenizer)
    (stream,) = tokenizer.streams(height, width)
    ids = torch.arange(stream.codebook_size)[:, None].expand(-1, stream.num_ids)
    parts = [tokenizer.vectors(ImageCodes(part, height, width, (stream,))) for part in ids.split(512)]
    return torch.cat([part[:, 0, 0] for part in parts])


@torch.no_grad()
def make_lessons(tokenizer: ImageTokenizer[Any], scenes: list[Scene]) -> Lessons:
    """The codes and features of scenes."""
    height, width = image_size(tokenizer)
    ids, features = [], []
    for start in range(0, len(scenes), 64):
        codes = tokenizer.encode(scene_images(scenes[start : start + 64], height))
        assert isinstance(codes, ImageCodes)
        ids.append(codes.ids)
        features.append(tokenizer.features(codes))
    return Lessons(scenes, torch.cat(ids), torch.cat(features), (height, width))
