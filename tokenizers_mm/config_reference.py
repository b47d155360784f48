"""Every key of a configuration with its type, default and meaning, from the dataclasses and their docstrings."""

import dataclasses
import re
import types
import typing
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Annotated, Any, Literal, Union

from tokenizers_mm.config import Choice, Keys, Length, Pattern, Range

COMMON = {
    "kind": "which of the kinds this is",
    "seed": "of all randomness of the run: weights, order and augmentation of samples, what is dropped",
    "model": "the tokenizer",
    "data": "samples for training",
    "loss": "terms and their weights",
    "optimizer": "of the networks that learn",
    "path": "folder that the samples come from, where the kind has one",
    "image_size": "height and width of the images in pixels",
    "width": "channels of the transformer",
    "depth": "number of blocks",
    "heads": "attention heads of a block",
    "mlp_ratio": "hidden channels of a block's MLP per channel",
    "dropout": "share of values that are left out in training",
    "grid": "rows and columns",
    "patch": "side of a patch in pixels",
    "activation": "between the two layers of a block's MLP",
    "channels": "channels of the first level",
    "out_channels": "channels of the output",
    "in_channels": "channels of the input",
    "multipliers": "channels of each level, as multiples of `channels`",
    "num_blocks": "residual blocks of each level",
    "num_layers": "layers that halve the image",
    "num_groups": "groups of the group norms",
    "middle": "residual blocks and attention between encoder and codes",
    "attention_levels": "levels with attention after each block, 0 the finest",
    "resampling": "how levels change size",
    "norm": "normalisation of the layers",
    "num_classes": "classes that condition the model",
    "codebook_size": "number of codes",
    "dim": "channels of a code",
    "step": "distance between sizes in pixels",
    "lr": "learning rate at its highest",
    "betas": "decay of the two moments of AdamW",
    "weight_decay": "of AdamW",
    "warmup": "steps from rate 0 to `lr`",
    "steps": "optimizer steps",
    "quantizer": "features to ids and vectors",
    "encoder": "image to features",
    "decoder": "vectors to image",
    "pixel_encoder": "image to pixel features",
    "pixel_decoder": "vectors to image",
    "semantic_decoder": "vectors to the features of a teacher or tower",
    "workers": "processes that decode samples; 0 for none beside the main one",
    "token_dim": "channels of a latent",
    "encoder_width": "channels of the encoder's transformer",
    "guidance_schedule": "of the guidance over the steps of sampling",
    "semantic_quantizer": "of the semantic stream",
    "pixel_quantizer": "of the pixel stream",
    "weight": "share among the others",
    "records": "files of rows, see the page on records",
    "stages": "parts of the run, in order",
    "inception": "file of weights for rFID; empty for none",
    "max_words": "words of a caption that are read",
}
"""Meanings of names that mean the same wherever they stand, for classes that do not say it."""


@dataclass(frozen=True)
class Key:
    """One key. kind: its type and limits in words. default: in YAML's words, "required" without one."""

    name: str
    kind: str
    default: str
    meaning: str
    depth: int


def keys_of(schema: Any, depth: int = 0) -> Iterator[Key]:
    """All keys of a dataclass, those of dataclasses inside of it after their key."""
    hints, meanings = typing.get_type_hints(schema, include_extras=True), meanings_of(schema)
    for field in dataclasses.fields(schema):
        inside = _schemas(hints[field.name])
        meaning = meanings.get(field.name) or _mentioned(schema, field.name) or COMMON.get(field.name, "")
        if not meaning and inside:
            meaning = (inside[0].__doc__ or "").strip().splitlines()[0].rstrip(".")
        yield Key(field.name, kind_of(hints[field.name]), _default(field), meaning, depth)
        for other in inside:
            yield from keys_of(other, depth + 1)


def as_text(sections: Iterable[tuple[str, type]]) -> str:
    """Titles and the keys of their dataclasses as plain text, for a terminal."""
    parts = []
    for title, schema in sections:
        lines = [title, "=" * len(title)]
        for key in keys_of(schema):
            indent = "  " * key.depth
            lines.append(f"{indent}{key.name}: {key.kind} [{key.default}]")
            lines += [f"{indent}    {key.meaning}"] if key.meaning else []
        parts.append("\n".join(lines))
    return "\n\n".join(parts)


def as_markdown(sections: Iterable[tuple[str, type]]) -> str:
    """Titles and the keys of their dataclasses as headings and tables."""
    parts = []
    for title, schema in sections:
        parts += [f"## {title}", "", "| key | type | default | meaning |", "|---|---|---|---|"]
        for key in keys_of(schema):
            cells = [f"`{'. ' * key.depth}{key.name}`", key.kind, f"`{key.default}`", key.meaning]
            parts.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
        parts.append("")
    return "\n".join(parts)


def meanings_of(schema: Any) -> dict[str, str]:
    """Meanings of the fields of a dataclass, from its docstring: entries `name: text` or `name, other: text`.

    An entry begins with a sentence and ends where the next one begins.
    """
    document = " ".join((schema.__doc__ or "").split())
    names = [field.name for field in dataclasses.fields(schema)]
    one = "|".join(sorted(names, key=len, reverse=True))
    entry = re.compile(rf"(?:^|(?<=[.;:)]\s))((?:`?(?:{one})`?)(?:(?:, | and )`?(?:{one})`?)*): ")
    found = list(entry.finditer(document))
    meanings: dict[str, str] = {}
    ends = [*(match.start() for match in found[1:]), len(document)] if found else []
    for match, end in zip(found, ends, strict=True):
        said = document[match.end() : end].strip().rstrip(".;")
        for name in re.split(r", | and ", match[1]):
            meanings[name.strip("`")] = said
    return meanings


def _mentioned(schema: Any, name: str) -> str:
    """The first sentence of a docstring in which a field is named in passing."""
    sentences = re.split(r"(?<=[.;])\s", " ".join((schema.__doc__ or "").split()))
    return next((s.rstrip(".;") for s in sentences if re.search(rf"\b{name}\b", s)), "")


def kind_of(hint: Any) -> str:
    """A type with its limits, in words."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is Annotated:
        marks = [_mark(mark) for mark in hint.__metadata__]
        return ", ".join([kind_of(arguments[0]), *(mark for mark in marks if mark)])
    if origin is Literal:
        return " or ".join('""' if choice == "" else str(choice) for choice in arguments)
    if origin in (Union, types.UnionType):
        return " or ".join(dict.fromkeys("null" if a is type(None) else kind_of(a) for a in arguments))
    if origin is tuple:
        several = len(arguments) == 2 and arguments[1] is Ellipsis
        return f"list of {kind_of(arguments[0])}" if several else f"[{', '.join(map(kind_of, arguments))}]"
    if dataclasses.is_dataclass(hint) or origin is dict:
        return "mapping"
    names = {bool: "true or false", int: "whole number", float: "number", str: "text", Any: "mapping"}
    return names.get(hint, "mapping")


def _mark(mark: Any) -> str:
    if isinstance(mark, Range):
        return str(mark).removeprefix("a number ")
    if isinstance(mark, Length):
        return f"{mark.low} to {mark.high}"
    if isinstance(mark, Pattern):
        return mark.meaning
    if isinstance(mark, Choice):
        return f"with kind: {' or '.join(mark.table)} (by default {mark.default})"
    if isinstance(mark, Keys):
        return "of " + ", ".join(typing.get_type_hints(mark.schema))
    return str(mark)


def _schemas(hint: Any) -> list[Any]:
    """Dataclasses in an annotation."""
    if dataclasses.is_dataclass(hint):
        return [hint]
    inside = typing.get_args(hint)[:1] if typing.get_origin(hint) is Annotated else typing.get_args(hint)
    return [schema for argument in inside for schema in _schemas(argument)]


def choices_of(schema: Any) -> Iterator[tuple[str, Choice]]:
    """Fields of a dataclass, and of those inside of it, whose configuration is chosen from a table by its kind."""
    for name, hint in typing.get_type_hints(schema, include_extras=True).items():
        marks = hint.__metadata__ if typing.get_origin(hint) is Annotated else ()
        yield from ((name, mark) for mark in marks if isinstance(mark, Choice))
        for other in _schemas(hint):
            yield from choices_of(other)


def _default(field: Any) -> str:
    if field.default is not dataclasses.MISSING:
        return _yaml(field.default)
    if field.default_factory is dataclasses.MISSING:
        return "required"
    made = field.default_factory()
    return "see below" if dataclasses.is_dataclass(made) else _yaml(made)


def _yaml(value: Any) -> str:
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, (tuple, list)):
        return f"[{', '.join('...' if dataclasses.is_dataclass(item) else _yaml(item) for item in value)}]"
    if dataclasses.is_dataclass(value):
        return "see below"
    return '""' if value == "" else str(value)
