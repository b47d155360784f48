"""Dataclass schemas from plain mappings and YAML: strict keys, types and ranges, and errors that name the full key.

A configuration class is a dataclass whose fields are numbers, strings, booleans, tuples, mappings or other such
dataclasses. Limits stand beside the fields:

    depth: Annotated[int, Range(0, 256)]
    betas: tuple[Annotated[float, Range(0, 1, high_open=True)], ...]
    names: Annotated[tuple[str, ...], Length(1, 8)]
    options: Annotated[dict[str, Any], Keys(SomeTypedDict)]
    quantizer: Annotated[Any, Choice(QUANTIZERS, "vq")]
    name: Annotated[str, Pattern(r"[a-z0-9_]+", "a plain name")]

What holds between fields is checked by an optional method `check(self)`, which raises with `require` and names relative
to its own class; `from_mapping` puts the path of the object before them. Nothing is built from a value that was not
checked. `OmegaConf` reads the YAML and the `key=value` overrides; what reaches the code are the dataclasses.
"""

import dataclasses
import difflib
import functools
import json
import math
import re
import types
import typing
from collections.abc import Iterable, Mapping, Sequence
from io import StringIO
from pathlib import Path
from typing import Annotated, Any, TypeVar, Union

import yaml
from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from tokenizers_mm._check import fail, require, shorten
from tokenizers_mm._files import regular_file
from tokenizers_mm._interpolation import MAX_DEPTH, MAX_ENTRIES, MAX_LENGTH, MAX_TEXT, Interpolation

T = TypeVar("T")

MAX_BYTES = 4 << 20
"""Limit of a configuration file."""

MAX_INT = 2**63 - 1
"""Limit of the size of a whole number without a `Range`."""


@dataclasses.dataclass(frozen=True)
class Range:
    """Limits of a number, both included unless open; None is no limit. NaN and infinity never fit."""

    low: float | None = None
    high: float | None = None
    low_open: bool = False
    high_open: bool = False

    def check(self, value: Any, where: str) -> None:
        """Refuse a number outside."""
        above = self.low is None or (value > self.low if self.low_open else value >= self.low)
        below = self.high is None or (value < self.high if self.high_open else value <= self.high)
        require(above and below, where, str(self), value)

    def __str__(self) -> str:
        low = None if self.low is None else f"{'above' if self.low_open else 'at least'} {self.low}"
        high = None if self.high is None else f"{'below' if self.high_open else 'at most'} {self.high}"
        return "a number " + " and ".join(part for part in (low, high) if part)


@dataclasses.dataclass(frozen=True)
class Length:
    """Limits of the number of values in a tuple or mapping, or of characters in a text."""

    low: int = 0
    high: int = MAX_LENGTH

    def check(self, value: Any, where: str) -> None:
        """Refuse a value with fewer or more."""
        unit = "characters" if isinstance(value, str) else "values"
        require(self.low <= len(value) <= self.high, where, f"{self.low} to {self.high} {unit}", f"{len(value)}")


@dataclasses.dataclass(frozen=True)
class Pattern:
    """A regular expression that a whole text must match, and how an error calls it."""

    regex: str
    meaning: str

    def check(self, value: Any, where: str) -> None:
        """Refuse a text that does not match."""
        require(re.fullmatch(self.regex, value) is not None, where, self.meaning, repr(value))


@dataclasses.dataclass(frozen=True)
class Keys:
    """The keys and types of a plain dictionary, as a TypedDict has them: options for something else, by name."""

    schema: Any

    def check(self, value: Any, where: str) -> None:
        """Refuse other keys and values."""
        _convert_typed_dict(self.schema, value, where)


@dataclasses.dataclass(frozen=True, eq=False)
class Choice:
    """The configuration of one class out of a table, chosen by its `kind`.

    table: classes with a `Config`, by kind; it may grow at any time. default: kind of a mapping that names none.
    """

    table: Mapping[str, Any]
    default: str

    def convert(self, value: Any, where: str) -> Any:
        """The checked configuration of the kind that `value` (a mapping or a configuration) names."""
        plain = to_mapping(value) if dataclasses.is_dataclass(value) else value
        require(isinstance(plain, Mapping), where, "a mapping with a kind", plain)
        kind = plain.get("kind", self.default)
        require(isinstance(kind, str) and kind in self.table, f"{where}.kind", f"one of {sorted(self.table)}", kind)
        return _build(self.table[kind].Config, plain, where)


Width = Annotated[int, Range(1, 1 << 16)]
"""Channels of a layer."""

Depth = Annotated[int, Range(0, 256)]
"""Blocks of a transformer."""

Heads = Annotated[int, Range(1, 1024)]

Cells = Annotated[int, Range(1, 1 << 12)]
"""Rows or columns of a grid."""

Pixels = Annotated[int, Range(1, 1 << 14)]
"""One side of an image."""

Codes = Annotated[int, Range(1, 1 << 26)]
"""Entries of a codebook."""

Share = Annotated[float, Range(0, 1)]

MLPRatio = Annotated[float, Range(0, 64, low_open=True)]
"""Hidden channels of a block's MLP per channel."""


def read_yaml(path: str | Path, overrides: Sequence[str] = (), *, allow_env: bool = False) -> dict[str, Any]:
    """A YAML file with `key.sub=value` overrides, interpolations `${key.sub}` resolved, as a plain dictionary.

    allow_env: resolve `${oc.env:NAME}` and `${oc.env:NAME,default}` too. A file from elsewhere could read secrets with
    them, so they are refused by default; other resolvers always are.
    """
    where = f"config {path}"
    if not Path(path).is_file():
        fail("config", "the path of a YAML file", str(path))
    try:
        size = Path(path).stat().st_size
        require(size <= MAX_BYTES, where, f"at most {MAX_BYTES} bytes", f"{size}")
        text = Path(path).read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        fail(where, "valid YAML", str(error))
    except OSError as error:
        fail(where, "a file that can be read", str(error))
    return parse_yaml(text, overrides, where, allow_env=allow_env)


def parse_yaml(text: str, overrides: Sequence[str], where: str, *, allow_env: bool = False) -> dict[str, Any]:
    """The text of a YAML file as `read_yaml` reads it. where: how errors call it."""
    for item in overrides:
        if "=" not in item:
            fail("override", "key=value", item)
    require(len(text) <= MAX_BYTES, where, f"at most {MAX_BYTES} characters", f"{len(text)}")
    try:
        nodes = yaml.compose(text, yaml.SafeLoader)
    except (yaml.YAMLError, RecursionError) as error:
        fail(where, "valid YAML", " ".join(str(error).split()))
    _check_nodes(nodes, where)
    try:
        loaded = OmegaConf.load(StringIO(text))
    except (yaml.YAMLError, OmegaConfBaseException, OSError, ValueError, TypeError) as error:
        fail(where, "valid YAML", " ".join(str(error).split()))
    if not isinstance(loaded, DictConfig):
        fail(where, "a mapping", "a list" if isinstance(loaded, ListConfig) else "one value")
    try:
        config = OmegaConf.merge(loaded, OmegaConf.from_dotlist(list(overrides)))
        data: Any = OmegaConf.to_container(config, resolve=False, throw_on_missing=True)
    except (OmegaConfBaseException, ValueError, TypeError, AttributeError, RecursionError, yaml.YAMLError) as error:
        fail(where, "values that can be read", str(error).partition("\n")[0])
    check_plain(data, where)
    return Interpolation(data, where, allow_env).all()


def from_mapping(schema: type[T], data: Mapping[str, Any], where: str = "config") -> T:
    """Build `schema` from a mapping; unknown or missing keys, wrong types and values out of range are errors that say
    where. All of the input is checked before the first part is built."""
    check_plain(data, where)
    return _build(schema, data, where)


def checked(config: T, where: str = "config") -> T:
    """A configuration that was made by calling its class, checked as `from_mapping` checks; an equal copy."""
    return from_mapping(type(config), to_mapping(config), where)


def to_mapping(config: Any) -> Any:
    """The inverse of `from_mapping`, made of dictionaries, lists and scalars (ready for JSON or YAML)."""
    if dataclasses.is_dataclass(config) and not isinstance(config, type):
        return {f.name: to_mapping(getattr(config, f.name)) for f in dataclasses.fields(config) if f.init}
    if isinstance(config, Mapping):
        return {key: to_mapping(value) for key, value in config.items()}
    if isinstance(config, (list, tuple)):
        return [to_mapping(value) for value in config]
    return config


def read_json(path: Path, max_bytes: int = MAX_BYTES, max_entries: int = MAX_ENTRIES) -> dict[str, Any]:
    """The mapping of a JSON file, with limits; one error for a file that is missing or holds something else."""
    size = regular_file(path, f"a {path.name}").stat().st_size
    require(size <= max_bytes, str(path), f"at most {max_bytes} bytes", f"{size}")
    try:
        data = path.read_bytes()
    except OSError as error:
        fail(str(path), "a file that can be read", str(error))
    return parse_json(data, str(path), max_entries)


def parse_json(data: bytes | str, where: str, max_entries: int = MAX_ENTRIES) -> dict[str, Any]:
    """The mapping that a JSON text holds, checked by `check_plain`."""
    try:
        found = json.loads(data.decode("utf-8") if isinstance(data, bytes) else data)
    except (ValueError, RecursionError) as error:  # bad JSON, bad UTF-8, a number of too many digits
        fail(where, "valid JSON", str(error))
    if not isinstance(found, dict):
        fail(where, "a JSON mapping", "another value")
    check_plain(found, where, max_entries)
    return found


def check_plain(data: Any, where: str, max_entries: int = MAX_ENTRIES) -> None:
    """Refuse data that no configuration has: too deep, too much, unprintable or very long texts, NaN and infinity."""
    left, stack = max_entries, [(data, where, 0)]
    while stack:
        value, place, depth = stack.pop()
        require(depth <= MAX_DEPTH, place[:200], f"at most {MAX_DEPTH} levels", "more")
        if isinstance(value, str):
            _check_text(value, place)
        elif isinstance(value, float):
            require(math.isfinite(value), place, "a finite number", value)
        elif isinstance(value, int):
            require(abs(value) <= MAX_INT, place, f"a whole number of at most {MAX_INT} in size", "a larger one")
        elif isinstance(value, (Mapping, list, tuple)):
            left -= len(value)
            require(left >= 0, where, f"at most {max_entries} values in all", "more")
            named = isinstance(value, Mapping)
            for key, item in value.items() if named else enumerate(value):
                if isinstance(key, str):
                    _check_text(key, f"{place}: a key")
                    require(len(key) <= 200, f"{place}: a key", "at most 200 characters", f"{len(key)}")
                stack.append((item, f"{place}.{key}" if named else f"{place}[{key}]", depth + 1))
        elif value is not None and not dataclasses.is_dataclass(value):
            fail(place, "a number, a text, true, false, a list or a mapping", type(value).__name__)


def _check_text(value: str, where: str) -> None:
    require(len(value) <= MAX_TEXT, where, f"at most {MAX_TEXT} characters", f"{len(value)}")
    require(value.isprintable() or "".join(value.split()).isprintable(), where, "printable text", repr(value))


def _build(schema: type[T], data: Any, where: str) -> T:
    """`from_mapping` for data that `check_plain` has seen."""
    if not isinstance(data, Mapping):
        fail(where, f"a mapping for {schema.__name__}", data)
    hints = _hints(schema)
    fields = {f.name: f for f in dataclasses.fields(schema) if f.init}  # type: ignore[arg-type]
    _check_keys(data, fields, where)
    values = {}
    for name, field in fields.items():
        if name in data:
            values[name] = _convert(hints[name], data[name], f"{where}.{name}")
        elif field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
            fail(f"{where}.{name}", "a value", "nothing")
    try:
        built = schema(**values)
        check = getattr(built, "check", None)
        if check is not None:
            check()
    except ValueError as error:
        raise ValueError(f"{where}.{error}") from None
    return built


@functools.cache
def _hints(schema: Any) -> dict[str, Any]:
    return typing.get_type_hints(schema, include_extras=True)


def _check_keys(data: Mapping[Any, Any], known: Iterable[str], where: str) -> None:
    known = list(known)
    for key in data:
        if key not in known:
            near = difflib.get_close_matches(str(key), known, n=1, cutoff=0.0)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise ValueError(f"{where}.{shorten(str(key))}: unknown key{hint}")


def _convert(hint: Any, value: Any, where: str, marks: tuple[Any, ...] = ()) -> Any:
    """One value checked against one annotation, of which `marks` are the limits."""
    schema: Any = hint
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is Annotated:
        for mark in hint.__metadata__:
            if isinstance(mark, Choice):
                return mark.convert(value, where)
        keys = next((mark.schema for mark in hint.__metadata__ if isinstance(mark, Keys)), arguments[0])
        value = _convert(keys, value, where, hint.__metadata__)
        for mark in hint.__metadata__:
            mark.check(value, where)
        return value
    if hint is Any:
        return value
    if origin in (Union, types.UnionType):
        return _convert_union(arguments, value, where)
    if origin is typing.Literal:
        if not any(type(value) is type(choice) and value == choice for choice in arguments):
            fail(where, f"one of {list(arguments)}", value)
        return value
    if dataclasses.is_dataclass(schema):
        return value if isinstance(value, schema) else _build(schema, value, where)  # type: ignore[arg-type]
    if typing.is_typeddict(schema):
        return _convert_typed_dict(schema, value, where)
    if origin in (tuple, dict, Mapping):
        convert = _convert_tuple if origin is tuple else _convert_mapping
        value = convert(arguments, value, where)
        if not any(isinstance(mark, Length) for mark in marks):
            Length().check(value, where)
        return value
    if schema is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if not isinstance(value, schema) or (isinstance(value, bool) and schema is not bool):
        fail(where, _name(schema), value)
    return value


def _name(schema: Any) -> str:
    """Name of a type in errors."""
    schema = typing.get_args(schema)[0] if typing.get_origin(schema) is Annotated else schema
    return getattr(schema, "__name__", str(schema))


def _convert_union(arguments: tuple[Any, ...], value: Any, where: str) -> Any:
    """The first alternative that fits; among dataclasses the one whose `kind` is named."""
    if value is None and type(None) in arguments:
        return None
    choices: list[Any] = [a for a in arguments if a is not type(None)]
    if len(choices) == 1:
        return _convert(choices[0], value, where)
    schemas = [a for a in choices if dataclasses.is_dataclass(a)]
    kinds: dict[str, Any] = {a.kind: a for a in schemas if isinstance(getattr(a, "kind", None), str)}  # type: ignore[attr-defined]
    if kinds and isinstance(value, Mapping):
        kind = value.get("kind")
        if not isinstance(kind, str) or kind not in kinds:
            fail(f"{where}.kind", f"one of {sorted(kinds)}", kind)
        return _build(kinds[kind], value, where)
    for choice in choices:
        try:
            return _convert(choice, value, where)
        except ValueError:
            continue
    fail(where, " or ".join(map(_name, choices)), value)


def _convert_tuple(arguments: tuple[Any, ...], value: Any, where: str) -> tuple[Any, ...]:
    if not isinstance(value, (list, tuple)):
        fail(where, "a list", value)
    if len(arguments) == 2 and arguments[1] is Ellipsis:
        return tuple(_convert(arguments[0], item, f"{where}[{i}]") for i, item in enumerate(value))
    if len(value) != len(arguments):
        fail(where, f"{len(arguments)} values", value)
    return tuple(_convert(a, item, f"{where}[{i}]") for i, (a, item) in enumerate(zip(arguments, value, strict=True)))


def _convert_mapping(arguments: tuple[Any, ...], value: Any, where: str) -> dict[Any, Any]:
    if not isinstance(value, Mapping):
        fail(where, "a mapping", value)
    key_type, item_type = arguments
    return {_convert(key_type, k, f"{where}: a key"): _convert(item_type, v, f"{where}.{k}") for k, v in value.items()}


def _convert_typed_dict(schema: Any, value: Any, where: str) -> dict[str, Any]:
    """A plain dictionary with the keys of a TypedDict: options for something else, by name and type."""
    if not isinstance(value, Mapping):
        fail(where, "a mapping", value)
    hints = _hints(schema)
    _check_keys(value, hints, where)
    for name in schema.__required_keys__:
        require(name in value, f"{where}.{name}", "a value", "nothing")
    return {name: _convert(hints[name], item, f"{where}.{name}") for name, item in value.items()}


def _check_nodes(root: Any, where: str) -> None:
    """Refuse YAML whose aliases unfold to more levels or values than a configuration may have."""
    left, stack = MAX_ENTRIES, [(root, 0)]
    while stack:
        node, depth = stack.pop()
        left -= 1
        require(depth <= MAX_DEPTH and left >= 0, where, f"at most {MAX_DEPTH} levels and {MAX_ENTRIES} values", "more")
        if isinstance(node, yaml.SequenceNode):
            stack += [(item, depth + 1) for item in node.value]
        elif isinstance(node, yaml.MappingNode):
            stack += [(item, depth + 1) for pair in node.value for item in pair]
