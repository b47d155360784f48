"""A small text tower and its contrast with the semantic features: meaning from captions alone."""

import re
import zlib
from dataclasses import dataclass
from typing import Annotated

import torch
from torch import Tensor, nn

from tokenizers_mm._check import require
from tokenizers_mm.config import Depth, Heads, Length, Range, Width, checked
from tokenizers_mm.functional.alignment import contrastive
from tokenizers_mm.layers.attention import Block, check_block


@dataclass(frozen=True)
class CaptionConfig:
    """Sizes of the text tower. Words are hashed into `buckets`, captions cut to `max_words`.

    swaps: groups of words that may stand for each other (all colours, say); `hard_negatives` altered copies of each
    caption, one word swapped, are added to what an image must tell its caption from (arXiv 2210.01936, section 4).
    """

    width: Width = 128
    depth: Depth = 2
    heads: Heads = 4
    buckets: Annotated[int, Range(1, 1 << 24)] = 4096
    max_words: Annotated[int, Range(1, 1 << 12)] = 40
    swaps: tuple[Annotated[tuple[str, ...], Length(2)], ...] = ()
    hard_negatives: Annotated[int, Range(0, 1024)] = 0

    def check(self) -> None:
        """Refuse sizes that no block has, and swaps without hard negatives or the other way round."""
        check_block(self.width, self.heads)
        both = bool(self.swaps) == (self.hard_negatives > 0)
        require(both, "hard_negatives", "above 0 where there are swaps, and only there", self.hard_negatives)


class CaptionContrast(nn.Module):
    """Image-caption contrastive term over semantic features [B, T, C]; samples without a caption are left out.

    An image is the mean and the maximum over its positions.
    """

    def __init__(self, semantic_dim: int, config: CaptionConfig) -> None:
        super().__init__()
        self.config = config = checked(config)
        self.semantic_dim = semantic_dim
        self.embed = nn.Embedding(config.buckets, config.width)
        self.positions = nn.Parameter(torch.randn(config.max_words, config.width) * 0.02)
        self.blocks = nn.ModuleList(Block(config.width, config.heads) for _ in range(config.depth))
        self.norm = nn.LayerNorm(config.width)
        self.image_head = nn.Linear(2 * semantic_dim, config.width)
        self.log_scale = nn.Parameter(torch.tensor(2.66))  # 1 / 0.07, as CLIP begins

    def encode_text(self, captions: list[str]) -> Tensor:
        """Captions to [B, width]."""
        ids, mask = self._words(captions)
        x = self.embed(ids) + self.positions[: ids.shape[1]]
        for block in self.blocks:
            x = block(x, mask=mask[:, None, None])
        keep = mask[..., None].to(x.dtype)
        return self.norm((x * keep).sum(1) / keep.sum(1))

    def encode_images(self, semantic: Tensor) -> Tensor:
        """Semantic features [B, T, C] to [B, width]."""
        return self.image_head(torch.cat([semantic.mean(1), semantic.amax(1)], dim=-1))

    def forward(self, semantic: Tensor, captions: list[str]) -> Tensor:
        present = [index for index, caption in enumerate(captions) if caption]
        if len(present) < 2:
            return semantic.sum() * 0.0
        images = self.encode_images(semantic[present])
        texts = [captions[i] for i in present]
        altered = [self._altered(text) for text in texts for _ in range(self.config.hard_negatives)]
        return contrastive(images, self.encode_text(texts + altered), self.log_scale)

    def _altered(self, caption: str) -> str:
        """One random word of a swap group replaced by another of its group; the caption itself where it has none."""
        words = caption.split()
        places = [(i, group) for i, word in enumerate(words) for group in self.config.swaps if word in group]
        if not places:
            return caption
        place, group = places[int(torch.randint(len(places), ()))]
        others = [word for word in group if word != words[place]]
        return " ".join([*words[:place], others[int(torch.randint(len(others), ()))], *words[place + 1 :]])

    def _words(self, captions: list[str]) -> tuple[Tensor, Tensor]:
        words = [re.findall(r"\w+", caption.lower())[: self.config.max_words] for caption in captions]
        longest = max(len(w) for w in words)
        ids = torch.zeros(len(words), longest, dtype=torch.int64)
        mask = torch.zeros(len(words), longest, dtype=torch.bool)
        for row, sentence in enumerate(words):
            ids[row, : len(sentence)] = torch.tensor([zlib.crc32(w.encode()) % self.config.buckets for w in sentence])
            mask[row, : len(sentence)] = True
        return ids.to(self.positions.device), mask.to(self.positions.device)
