"""A published family of checkpoints: what reads it, and which files were described, in one table row each."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tokenizers_mm._check import require
from tokenizers_mm.checkpoints.upstream import WRAPPERS, get
from tokenizers_mm.models import ImageTokenizer

Converter = Callable[..., ImageTokenizer[Any]]


@dataclass(frozen=True)
class Checkpoint:
    """A published file.

    source: hub repository and file, or an address. image: (height, width) the counts are for. ids: per image of this
    size. bits: of all of them together. license: of the weights, as its publisher states it. shown: what is compared
    with what, and where.
    """

    source: str
    image: tuple[int, int]
    ids: int
    bits: float
    license: str
    shown: str


@dataclass(frozen=True)
class Family:
    """A converter and the files it reads.

    convert: (tensors, where, config, **options) -> tokenizer; its options are keyword-only parameters. wrappers: keys
    of a file of `torch.save` under which the weights are looked for, in order.
    """

    convert: Converter
    checkpoints: tuple[Checkpoint, ...]
    wrappers: Sequence[str] = WRAPPERS


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
