"""A small image tokenizer and small text tokenizers, for tests of language models."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast

from tokenizers_mm.models.base import ImageTokenizer
from tokenizers_mm.types import UNDISTURBED, Disturbance, ImageCodes, ImageLatents, Reconstruction, Stream

Grids = tuple[tuple[int, int], ...]


class FakeTokenizer(ImageTokenizer):
    """Each stream is the brightness on its grids, in codebook_size steps; the last grid of the last stream is shown."""

    family = "fake"
    Config = dict

    def __init__(
        self,
        streams: dict[str, tuple[int, Callable[[int, int], Grids]]],
        image_size: tuple[int, int] | None,
        multiple: int = 1,
    ) -> None:
        super().__init__()
        self.anchor = nn.Parameter(torch.zeros(1))
        self._streams, self._image_size, self._multiple = streams, image_size, multiple
        self.config = {name: size for name, (size, _) in streams.items()}

    @classmethod
    def from_config(cls, config: Any) -> "FakeTokenizer":
        return cls(**config)

    @property
    def image_size(self) -> tuple[int, int] | None:
        return self._image_size

    @property
    def size_multiple(self) -> int:
        return self._multiple

    def streams(self, height: int, width: int) -> tuple[Stream, ...]:
        self.check_size(height, width)
        return tuple(Stream(name, size, grids(height, width)) for name, (size, grids) in self._streams.items())

    def encode_tensor(self, x: Tensor) -> ImageCodes:
        height, width = x.shape[-2:]
        grey, parts = x.mean(1, keepdim=True), []
        for stream in self.streams(height, width):
            for grid in stream.grids:
                level = (F.adaptive_avg_pool2d(grey, grid) + 1) / 2
                parts.append((level * stream.codebook_size).long().clamp(0, stream.codebook_size - 1).flatten(1))
        return ImageCodes(torch.cat(parts, 1), height, width, self.streams(height, width))

    def vectors(self, codes: ImageCodes | ImageLatents) -> Tensor:
        assert isinstance(codes, ImageCodes)
        start, last = 0, torch.zeros(len(codes), 1, 1)
        for stream in codes.streams:
            for rows, columns in stream.grids:
                ids = codes.ids[:, start : start + rows * columns]
                start += rows * columns
                if ids.shape[1]:
                    last = (ids.float() + 0.5).view(-1, rows, columns) / stream.codebook_size * 2 - 1
        return last[..., None] + 0 * self.anchor

    def decode(self, codes: ImageCodes | ImageLatents) -> Tensor:
        level = self.vectors(codes).permute(0, 3, 1, 2)
        return F.interpolate(level, size=(codes.height, codes.width)).expand(-1, 3, -1, -1)

    def reconstruct(self, x: Tensor, disturbance: Disturbance = UNDISTURBED) -> Reconstruction:
        codes = self.encode_tensor(x)
        return Reconstruction(self.decode(codes), None, None, {}, self.vectors(codes))

    def quantizers(self) -> dict[str, Any]:
        return {}

    @property
    def last_layer(self) -> nn.Parameter:
        return self.anchor

    def features(self, images_or_codes: Any) -> Tensor:
        codes = images_or_codes if isinstance(images_or_codes, ImageCodes) else self.encode(images_or_codes)
        return self.vectors(codes).flatten(1, 2).repeat(1, 1, 3)


def one_scale(size: int = 16, codebook: int = 8) -> FakeTokenizer:
    """A fixed-size tokenizer of one 4 x 4 grid."""
    return FakeTokenizer({"pixel": (codebook, lambda h, w: ((4, 4),))}, (size, size), 4)


def multi_scale() -> FakeTokenizer:
    """A fixed-size tokenizer of three scales."""
    return FakeTokenizer({"shared": (8, lambda h, w: ((1, 1), (2, 2), (4, 4)))}, (16, 16), 4)


def dual(semantic: int = 8, pixel: int = 16, step: int = 32) -> FakeTokenizer:
    """A tokenizer of two streams for any multiple of 64; a semantic cell is `step` pixels, a pixel cell half of it."""
    return FakeTokenizer(
        {
            "semantic": (semantic, lambda h, w: ((h // step, w // step),)),
            "pixel": (pixel, lambda h, w: ((2 * h // step, 2 * w // step),)),
        },
        None,
        64,
    )


def words(texts: Sequence[str] = (), size: int | None = None, **special: str) -> PreTrainedTokenizerFast:
    """A word-level text tokenizer over the words of `texts`; `size` fills it up to so many tokens."""
    special = {"pad_token": "<pad>", "eos_token": "<eos>", "unk_token": "<unk>", **special}
    vocabulary = dict.fromkeys(special.values())
    pieces = pre_tokenizers.Whitespace()
    for text in texts:
        vocabulary |= dict.fromkeys(piece for piece, _ in pieces.pre_tokenize_str(text))
    for index in range(len(vocabulary), size or 0):
        vocabulary[f"w{index}"] = None
    core = Tokenizer(models.WordLevel({word: i for i, word in enumerate(vocabulary)}, unk_token=special["unk_token"]))
    core.pre_tokenizer = pieces
    return PreTrainedTokenizerFast(tokenizer_object=core, **special)


def byte_level() -> PreTrainedTokenizerFast:
    """A byte-level text tokenizer: any text comes back as it was."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {"<|endoftext|>": 0, **{letter: i + 1 for i, letter in enumerate(letters)}}
    core = Tokenizer(models.BPE(vocabulary, []))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<|endoftext|>", pad_token="<|endoftext|>")


def pieces() -> PreTrainedTokenizerFast:
    """A sentencepiece-like text tokenizer (unigrams, bytes as fall-back, a start token)."""
    scores = [("<unk>", 0.0), ("<s>", 0.0), ("</s>", 0.0)]
    scores += [(f"<0x{byte:02X}>", -20.0) for byte in range(256)]
    scores += [("▁", -2.0), ("▁a", -1.0), *[(chr(97 + i), -3.0) for i in range(26)]]
    core = Tokenizer(models.Unigram(scores, unk_id=0, byte_fallback=True))
    core.pre_tokenizer = pre_tokenizers.Metaspace()
    core.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace()])
    core.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=core, bos_token="<s>", eos_token="</s>", unk_token="<unk>", pad_token="</s>"
    )
