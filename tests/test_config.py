"""Strict configuration: types, nearest keys, round trips."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import pytest

from tokenizers_mm.config import from_mapping, read_yaml, to_mapping


@dataclass(frozen=True)
class Inner:
    width: int
    names: tuple[str, ...] = ()
    mode: Literal["a", "b"] = "a"


@dataclass(frozen=True)
class Left:
    kind: Literal["left"] = "left"
    x: float = 1.0


@dataclass(frozen=True)
class Outer:
    inner: Inner
    pair: tuple[int, float] = (1, 2.0)
    maybe: int | None = None
    table: dict[str, int] = field(default_factory=dict)
    flag: bool = False


def test_round_trip() -> None:
    config = Outer(Inner(3, ("x", "y"), "b"), (4, 5.5), 7, {"k": 1}, True)
    assert from_mapping(Outer, to_mapping(config)) == config
    assert from_mapping(Outer, {"inner": {"width": 2}, "pair": [1, 2]}).pair == (1, 2.0)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({}, "config.inner: expected a value, got nothing"),
        ({"inner": {"width": 1, "name": []}}, "config.inner.name: unknown key; did you mean 'names'"),
        ({"inner": {"width": "wide"}}, "config.inner.width: expected int, got wide"),
        ({"inner": {"width": True}}, "config.inner.width: expected int, got True"),
        ({"inner": {"width": 1, "mode": "c"}}, r"config.inner.mode: expected one of \['a', 'b'\], got c"),
        ({"inner": {"width": 1}, "pair": [1]}, "config.pair: expected 2 values"),
        ({"inner": {"width": 1}, "maybe": "x"}, "config.maybe: expected int, got x"),
        ({"inner": {"width": 1}, "flag": 1}, "config.flag: expected bool, got 1"),
        ({"inner": {"width": 1}, "table": {"k": "v"}}, "config.table.k: expected int, got v"),
        ({"inner": 3}, "config.inner: expected a mapping for Inner, got 3"),
    ],
)
def test_errors_say_where(data: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        from_mapping(Outer, data)


def test_yaml_with_overrides_and_interpolation(tmp_path: Path) -> None:
    path = tmp_path / "a.yaml"
    path.write_text("inner: {width: 3}\nmaybe: ${inner.width}\n")
    assert from_mapping(Outer, read_yaml(path, ["inner.width=5", "flag=true"])) == Outer(Inner(5), maybe=5, flag=True)
    path.write_text("a: [1\n")
    with pytest.raises(ValueError, match="expected valid YAML, got"):
        read_yaml(path)
    path.write_text("- 1\n")
    with pytest.raises(ValueError, match="expected a mapping, got a list"):
        read_yaml(path)
