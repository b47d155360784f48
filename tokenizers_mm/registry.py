"""`register(kind, name, value)`: parts of the caller's own in the tables of the library, for configurations to name."""

import dataclasses
import importlib
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from tokenizers_mm._check import fail, require

OBJECTIVES: dict[str, Any] = {}
"""Objectives of training that were registered, by kind; the training program has those of its own."""


@dataclass(frozen=True)
class Kind:
    """One table.

    module, table: where it is. base: module and name of the class that entries derive from; "" for a callable.
    config: whether entries have a dataclass `Config`. says: attribute of the class (or of its Config) that must be the
    name.
    """

    module: str
    table: str
    base: tuple[str, str] | None = None
    config: bool = False
    says: str = ""


KINDS = {
    "family": Kind("models", "MODELS", ("models.base", "ImageTokenizer"), config=True, says="family"),
    "quantizer": Kind("quantizers", "QUANTIZERS", ("quantizers.base", "Quantizer"), config=True, says="Config.kind"),
    "loss": Kind("losses", "LOSSES"),
    "source": Kind("data.sources", "SOURCES"),
    "metric": Kind("eval.metrics", "METRICS", ("eval.base", "Metric"), says="name"),
    "objective": Kind("registry", "OBJECTIVES", config=True, says="kind"),
}
"""Kinds of values that can be registered, and the table that holds each."""

_added: dict[tuple[str, str], tuple[str, str]] = {}


def register(kind: str, name: str, value: Any = None) -> Any:
    """Add a class or function to a table of the library; returns it. Without `value`, a decorator.

    kind: "family" (an `ImageTokenizer`), "quantizer" (a `Quantizer`), "loss" (a function of the images and the
    `Reconstruction`), "source" (samples of training, see `data.sources.Source`), "metric" (an `eval.base.Metric`) or
    "objective". name: lower case letters, digits and underscores, as configurations will say it. value: the class or
    function; one that was registered before by the same name from the same place (a cell of a notebook that runs again)
    is replaced.

    Raises: ValueError for a name that is taken, and for a value that is not of the kind.

        @tmm.register("loss", "edges")
        def edges(x, output): ...
    """
    if kind not in KINDS:
        fail("kind", f"one of {', '.join(KINDS)}", kind)
    if value is None:
        return lambda value: register(kind, name, value)
    require(isinstance(name, str) and re.fullmatch("[a-z][a-z0-9_]*", name) is not None, "name",
            "lower case letters, digits and underscores", name)  # fmt: skip
    _check(KINDS[kind], kind, name, value)
    table = _table(KINDS[kind])
    place = (getattr(value, "__module__", ""), getattr(value, "__qualname__", ""))
    if name in table and table[name] is not value and _added.get((kind, name)) != place:
        fail("name", f"a {kind} that is not there yet (there are {', '.join(sorted(table))})", name)
    table[name], _added[kind, name] = value, place
    return value


def _table(kind: Kind) -> dict[str, Any]:
    return getattr(importlib.import_module(f"tokenizers_mm.{kind.module}"), kind.table)


def _check(kind: Kind, what: str, name: str, value: Any) -> None:
    """Refuse a value that the code that reads the table could not use."""
    where = f"{what} {name!r}"
    require(callable(value), where, "a class or a function", value)
    if kind.base is not None:
        base: Callable[..., Any] = getattr(importlib.import_module(f"tokenizers_mm.{kind.base[0]}"), kind.base[1])
        require(isinstance(value, type) and issubclass(value, base), where, f"a subclass of {kind.base[1]}", value)  # type: ignore[arg-type]
    if kind.config:
        config = getattr(value, "Config", None)
        require(dataclasses.is_dataclass(config), where, "a dataclass as its Config", config)
    if kind.says:
        said: Any = value
        for part in kind.says.split("."):
            said = getattr(said, part, None)
        require(said == name, f"{where}: {kind.says}", repr(name), repr(said))
