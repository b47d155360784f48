"""A published family of checkpoints: what reads it, and which files were described, in one table row each."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers_mm._check import require
from tokenizers_mm.checkpoints.upstream import WRAPPERS, get
from tokenizers_mm.models import ImageTokenizer

Converter = Callable[..., ImageTokenizer[Any]]


@dataclass(frozen=True)
class Checkpoint:
    """A published file.

    source: hub repository and file. image: (height, width) of the images that `streams` is for. streams: ids of an
    image and codes of one id, for each stream; none where latents are continuous. license: of the weights, as their
    publisher states it. shown: what the tests compare with what.
    """

    source: str
    image: tuple[int, int]
    streams: tuple[tuple[int, int], ...]
    license: str
    shown: str

    @property
    def ids(self) -> int:
        """Ids per image."""
        return sum(count for count, _ in self.streams)

    @property
    def bits(self) -> float:
        """Bits per image."""
        return sum(count * math.log2(codes) for count, codes in self.streams)


@dataclass(frozen=True)
class Family:
    """A converter and the files it reads.

    convert: (tensors, where, config, **options) -> tokenizer; its options are keyword-only parameters. wrappers: keys
    of a file of `torch.save` under which the weights are looked for, in order; `a.b` for a key inside another.
    names, prefixes: see `upstream.files_of`. parts: (a downloaded folder) -> the checkpoint in it, and options that
    other files of it say.
    """

    convert: Converter
    checkpoints: tuple[Checkpoint, ...]
    wrappers: Sequence[str] = WRAPPERS
    names: Sequence[str] = ()
    prefixes: Sequence[str] = ()
    parts: Callable[[Path], tuple[Path, Mapping[str, Any]]] | None = None


def check_description(config: Mapping[str, Any] | None, facts: Mapping[str, Any]) -> None:
    """Refuse a description of sizes that says something else than the file's names and shapes.

    facts: what they say, by the key of a description (`ddconfig.ch`); keys that a description lacks are not compared.
    """
    for key, value in facts.items():
        if config is not None and _has(config, key):
            stated = get(config, key)
            same = tuple(stated) == tuple(value) if isinstance(value, tuple) else stated == value
            require(same, f"config: {key}", f"{value}, as in the file", stated)


def _has(config: Any, path: str) -> bool:
    for key in path.split("."):
        if not isinstance(config, Mapping) or config.get(key) is None:
            return False
        config = config[key]
    return True
