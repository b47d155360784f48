"""Walks over the keys of a configuration, for tests that change each of them. Not a test by itself."""

import dataclasses
import types
import typing
from collections.abc import Iterator, Mapping
from typing import Any

Path = tuple[Any, ...]
"""Names of fields and indices of tuples, from the top."""


def fields(config: Any, path: Path = ()) -> Iterator[tuple[Path, type, str]]:
    """Paths of all fields of a configuration and of those inside, with the class and the name of each."""
    for field in dataclasses.fields(config):
        value, here = getattr(config, field.name), (*path, field.name)
        for index, item in enumerate(value if isinstance(value, tuple) else ()):
            if dataclasses.is_dataclass(item):
                yield from fields(item, (*here, index))
        if dataclasses.is_dataclass(value):
            yield from fields(value, here)
        else:
            yield here, type(config), field.name


def dotted(path: Path) -> str:
    """The key as a file has it, without the indices of lists."""
    return ".".join(part for part in path if isinstance(part, str))


def at(data: Any, path: Path) -> Any:
    """The value at a path of a plain mapping."""
    return at(data[path[0]], path[1:]) if path else data


def changed(data: Any, path: Path, value: Any) -> Any:
    """A copy of a plain mapping with the value at a path replaced."""
    if not path:
        return value
    copy = dict(data) if isinstance(data, dict) else list(data)
    copy[path[0]] = changed(copy[path[0]], path[1:], value)
    return copy


def another(path: Path, schema: type, value: Any, others: Mapping[str, Any]) -> Any:
    """Another value for a field of a class: by the end of its key in `others` (the longest counts), or a near one."""
    key = dotted(path)
    for end in sorted(others, key=len, reverse=True):
        if f".{key}".endswith(f".{end}"):
            return others[end]
    choices = [choice for choice in _choices(typing.get_type_hints(schema)[key.rpartition(".")[2]]) if choice != value]
    if choices:
        return choices[0]
    if isinstance(value, bool):
        return not value
    if isinstance(value, int):
        return value + 1
    if isinstance(value, float):
        return value * 0.5 if value else 0.5
    if isinstance(value, list) and value:
        return value[1:] if isinstance(value[0], list) else [another(path, schema, value[0], {}), *value[1:]]
    raise AssertionError(f"{key}: another value than {value}")


def _choices(hint: Any) -> tuple[Any, ...]:
    """Values of a Literal, alone or in a union."""
    if typing.get_origin(hint) is typing.Literal:
        return typing.get_args(hint)
    inside = typing.get_args(hint) if typing.get_origin(hint) in (typing.Union, types.UnionType) else ()
    return tuple(choice for part in inside for choice in _choices(part))
