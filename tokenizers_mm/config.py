"""Dataclass schemas from plain mappings and YAML: strict keys, checked types, and an error that names the nearest key.

A configuration class is a dataclass whose fields are numbers, strings, booleans, tuples, mappings or other such
dataclasses. `OmegaConf` reads the YAML and the `key=value` overrides; what reaches the code are the dataclasses.
"""

import dataclasses
import difflib
import types
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar, Union

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from tokenizers_mm._check import fail

T = TypeVar("T")


def read_yaml(path: str | Path, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """A YAML file with `key.sub=value` overrides, interpolations resolved, as a plain dictionary."""
    if not Path(path).is_file():
        fail("config", "the path of a YAML file", str(path))
    for item in overrides:
        if "=" not in item:
            fail("override", "key=value", item)
    try:
        loaded = OmegaConf.load(path)
    except YAMLError as error:
        fail(f"config {path}", "valid YAML", " ".join(str(error).split()))
    if not isinstance(loaded, DictConfig):
        fail(f"config {path}", "a mapping", "a list")
    try:
        config = OmegaConf.merge(loaded, OmegaConf.from_dotlist(list(overrides)))
        data = OmegaConf.to_container(config, resolve=True, throw_on_missing=True)
    except (OmegaConfBaseException, ValueError, YAMLError) as error:
        fail(f"config {path}", "values that can be read", str(error).splitlines()[0])
    return typing.cast(dict[str, Any], data)


def from_mapping(schema: type[T], data: Mapping[str, Any], where: str = "config") -> T:
    """Build `schema` from a mapping; unknown or missing keys and wrong types are errors that say where."""
    if not isinstance(data, Mapping):
        fail(where, f"a mapping for {schema.__name__}", data)
    hints = typing.get_type_hints(schema)
    fields = {f.name: f for f in dataclasses.fields(schema) if f.init}  # type: ignore[arg-type]
    for key in data:
        if key not in fields:
            near = difflib.get_close_matches(str(key), fields, n=1, cutoff=0.0)
            raise ValueError(
                f"{where}.{key}: unknown key; did you mean {near[0]!r}?" if near else f"{where}.{key}: unknown key"
            )
    values = {}
    for name, field in fields.items():
        if name in data:
            values[name] = _convert(hints[name], data[name], f"{where}.{name}")
        elif field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
            fail(f"{where}.{name}", "a value", "nothing")
    return schema(**values)


def to_mapping(config: Any) -> Any:
    """The inverse of `from_mapping`, made of dictionaries, lists and scalars (ready for JSON or YAML)."""
    if dataclasses.is_dataclass(config) and not isinstance(config, type):
        return {f.name: to_mapping(getattr(config, f.name)) for f in dataclasses.fields(config) if f.init}
    if isinstance(config, Mapping):
        return {key: to_mapping(value) for key, value in config.items()}
    if isinstance(config, (list, tuple)):
        return [to_mapping(value) for value in config]
    return config


def _convert(hint: Any, value: Any, where: str) -> Any:
    """One value checked against one annotation."""
    schema: Any = hint
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any:
        return value
    if origin in (Union, types.UnionType):
        return _convert_union(arguments, value, where)
    if origin is typing.Literal:
        if value not in arguments:
            fail(where, f"one of {list(arguments)}", value)
        return value
    if _is_schema(schema):
        return value if isinstance(value, schema) else from_mapping(schema, value, where)
    if origin is tuple:
        return _convert_tuple(arguments, value, where)
    if origin in (dict, Mapping):
        if not isinstance(value, Mapping):
            fail(where, "a mapping", value)
        return {key: _convert(arguments[1], item, f"{where}.{key}") for key, item in value.items()}
    if schema is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if not isinstance(value, schema) or (isinstance(value, bool) and schema is not bool):
        fail(where, schema.__name__, value)
    return value


def _convert_union(arguments: tuple[Any, ...], value: Any, where: str) -> Any:
    """The first alternative that fits; among dataclasses the one whose `kind` is named."""
    if value is None and type(None) in arguments:
        return None
    choices: list[Any] = [a for a in arguments if a is not type(None)]
    if len(choices) == 1:
        return _convert(choices[0], value, where)
    kinds = {a.kind: a for a in choices if _is_schema(a) and isinstance(getattr(a, "kind", None), str)}
    if kinds and isinstance(value, Mapping):
        kind = value.get("kind")
        if kind not in kinds:
            fail(f"{where}.kind", f"one of {sorted(kinds)}", kind)
        return from_mapping(kinds[kind], value, where)
    for choice in choices:
        try:
            return _convert(choice, value, where)
        except ValueError:
            continue
    fail(where, " or ".join(getattr(c, "__name__", str(c)) for c in choices), value)


def _convert_tuple(arguments: tuple[Any, ...], value: Any, where: str) -> tuple[Any, ...]:
    if not isinstance(value, (list, tuple)):
        fail(where, "a list", value)
    if len(arguments) == 2 and arguments[1] is Ellipsis:
        return tuple(_convert(arguments[0], item, f"{where}[{i}]") for i, item in enumerate(value))
    if len(value) != len(arguments):
        fail(where, f"{len(arguments)} values", value)
    return tuple(_convert(a, item, f"{where}[{i}]") for i, (a, item) in enumerate(zip(arguments, value, strict=True)))


def _is_schema(hint: Any) -> bool:
    return dataclasses.is_dataclass(hint)
