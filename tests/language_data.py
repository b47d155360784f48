"""A tiny image tokenizer, a text tokenizer and records for tests of language-model training."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import torch

from tests.cases import ROOT
from tests.llm.fakes import words
from tokenizers_mm.models import ImageTokenizer
from train.__main__ import main
from train.config import RunConfig

DEBUG = str(ROOT / "configs" / "language_debug.yaml")

SHARED = {field.name for field in dataclasses.fields(RunConfig)}

TINY = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
"""Sizes of a language model."""


def make_folder(place: Path, tokenizer: ImageTokenizer[Any], side: int = 32) -> Path:
    """`tokenizer`, `text`, and records of noise in two colours that show it as ids and as features."""
    tokenizer.save(place / "tokenizer")
    words(["see the picture : red blue"], mask_token="<mask>").save_pretrained(str(place / "text"))
    lines: dict[str, list[Any]] = {"ids": [], "features": []}
    for index in range(4):
        x = torch.rand(1, 3, side, side, generator=torch.Generator().manual_seed(index)) * 2 - 1
        x[:, (2, 0)[index % 2]] = -1
        tokenizer.to_pil(x)[0].save(place / f"{index}.png")
        colour = ("red", "blue")[index % 2]
        image = {"image": f"{index}.png"}
        lines["ids"] += [[{"text": colour, "learn": False}, image], [{**image, "learn": False}, {"text": colour}]]
        lines["features"].append([{**image, "learn": False, "features": True}, {"text": f"the picture : {colour}"}])
    for name, rows in lines.items():
        (place / f"{name}.jsonl").write_text("\n".join(json.dumps({"content": row}) for row in rows))
    return place


def arguments(folder: Path, out: Path, records: str = "ids", config: str = DEBUG, **options: Any) -> list[str]:
    """Arguments of the program for the records of a folder."""
    given = [
        config,
        f"out={out}",
        f"objective.tokenizer={folder / 'tokenizer'}",
        f"objective.records=[{{path: {folder}/{records}.jsonl}}]",
    ]
    if "language_model.source" not in options:
        given.append(f"objective.language_model.text_tokenizer={folder / 'text'}")
    return [*given, *(f"{key if key in SHARED else f'objective.{key}'}={value}" for key, value in options.items())]


def train(folder: Path, out: Path, records: str = "ids", **options: Any) -> list[dict[str, float]]:
    """Run the program; returns the lines of its log."""
    assert main(arguments(folder, out, records, **options)) == 0
    return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
