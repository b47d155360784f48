"""Embedding of captions as the condition of a generator."""

import re
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

import torch
from torch import Tensor, nn

from tokenizers_mm.config import Range


@dataclass(frozen=True)
class CaptionEmbeddingConfig:
    """Words, each with its place in the caption, hashed into `buckets`; captions are cut to `max_words`."""

    buckets: Annotated[int, Range(1, 1 << 24)] = 8192
    max_words: Annotated[int, Range(1, 4096)] = 48


class CaptionEmbedding(nn.Module):
    """Captions to condition vectors [B, C] for MAR's buffers: a sum over words at places, and a small MLP."""

    def __init__(self, width: int, config: CaptionEmbeddingConfig) -> None:
        super().__init__()
        self.config = config
        self.words = nn.EmbeddingBag(config.buckets, width, mode="sum")
        self.mlp = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width))
        nn.init.normal_(self.words.weight, std=0.2)

    def forward(self, captions: Sequence[str]) -> Tensor:
        rows = [re.findall(r"\w+", caption.lower())[: self.config.max_words] for caption in captions]
        ids = [[zlib.crc32(f"{i} {w}".encode()) % self.config.buckets for i, w in enumerate(row)] for row in rows]
        flat = torch.tensor([number for row in ids for number in row], dtype=torch.int64)
        starts = torch.tensor([0, *[len(row) for row in ids[:-1]]]).cumsum(0)
        device = self.words.weight.device
        return self.mlp(self.words(flat.to(device), starts.to(device)))
