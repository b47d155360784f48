"""Strict configuration: types, nearest keys, round trips."""

from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any, Literal, TypedDict

import pytest

from tokenizers_mm._check import require
from tokenizers_mm.config import (
    MAX_DEPTH,
    MAX_ENTRIES,
    MAX_LENGTH,
    MAX_TEXT,
    Keys,
    Length,
    Pattern,
    Range,
    checked,
    from_mapping,
    read_yaml,
    to_mapping,
)


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


class Options(TypedDict, total=False):
    depth: Annotated[int, Range(1, 8)]
    size: Annotated[int, Range(1)] | tuple[int, int]


@dataclass(frozen=True)
class Limited:
    width: Annotated[int, Range(1, 64)] = 8
    heads: Annotated[int, Range(1, 64)] = 2
    rate: Annotated[float, Range(0, 1, low_open=True, high_open=True)] = 0.5
    betas: tuple[Annotated[float, Range(0, 1, high_open=True)], ...] = ()
    pair: Annotated[tuple[int, ...], Length(1, 2)] = (1,)
    name: Annotated[str, Pattern("[a-z]+", "a plain name")] = "a"
    maybe: Annotated[int, Range(0)] | None = None
    side: Left | Inner | None = None
    options: Annotated[dict[str, Any], Keys(Options)] = field(default_factory=dict)
    anything: dict[str, Any] = field(default_factory=dict)

    def check(self) -> None:
        require(self.width % self.heads == 0, "width", f"a multiple of {self.heads}", self.width)


def nested(levels: int) -> Any:
    value: Any = 1
    for _ in range(levels):
        value = [value]
    return value


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"width": 0}, "config.width: expected a number at least 1 and at most 64, got 0"),
        ({"width": 10**400}, "config.width: expected a whole number of at most"),
        ({"width": 7}, "config.width: expected a multiple of 2, got 7"),
        ({"rate": 1}, "config.rate: expected a number above 0 and below 1, got 1.0"),
        ({"rate": float("nan")}, "config.rate: expected a finite number, got nan"),
        ({"rate": float("inf")}, "config.rate: expected a finite number, got inf"),
        ({"betas": [0.5, 1.0]}, r"config.betas\[1\]: expected a number at least 0 and below 1, got 1.0"),
        ({"betas": [0.0] * (MAX_LENGTH + 1)}, "config.betas: expected 0 to 4096 values, got 4097"),
        ({"pair": []}, "config.pair: expected 1 to 2 values, got 0"),
        ({"name": "a/b"}, "config.name: expected a plain name, got 'a/b'"),
        ({"maybe": -1}, "config.maybe: expected a number at least 0, got -1"),
        ({"side": {"kind": []}}, r"config.side: expected Left or Inner|config.side.kind"),
        ({"options": {"depht": 1}}, "config.options.depht: unknown key; did you mean 'depth'"),
        ({"options": {"depth": 9}}, "config.options.depth: expected a number at least 1 and at most 8, got 9"),
        ({"options": {"size": [1, "x"]}}, "config.options.size: expected int or tuple"),
        ({"anything": {"a": [float("inf")]}}, r"config.anything.a\[0\]: expected a finite number"),
        ({"anything": {"a": nested(MAX_DEPTH)}}, "expected at most 32 levels, got more"),
        ({"anything": {"a": nested(100_000)}}, "expected at most 32 levels, got more"),
        ({"anything": {"a": [0] * MAX_ENTRIES}}, "config: expected at most 100000 values in all, got more"),
        ({"anything": {"a": "x" * (MAX_TEXT + 1)}}, "config.anything.a: expected at most 10000 characters"),
        ({"anything": {"a": "\x1b[2J"}}, "config.anything.a: expected printable text, got"),
        ({"anything": {"a": "\ud800"}}, "config.anything.a: expected printable text, got"),
        ({"anything": {"a": object()}}, "config.anything.a: expected a number, a text"),
        ({"x" * 5000: 1}, "config: a key: expected at most 200 characters, got 5000"),
        ({"name": {}}, "config.name: expected str, got {}"),
        ({"options": 3}, "config.options: expected a mapping, got 3"),
        ({1: 2}, "config.1: unknown key"),
    ],
)
def test_limits_stand_beside_the_fields(data: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message) as raised:
        from_mapping(Limited, data)
    assert len(str(raised.value)) < 2000
    assert "\n" not in str(raised.value)


def test_values_in_range_pass_as_they_are() -> None:
    data = {"width": 64, "rate": 0.9, "betas": [0, 0.9], "options": {"depth": 8, "size": [4, 4]}}
    config = from_mapping(Limited, data)
    assert config == Limited(64, rate=0.9, betas=(0.0, 0.9), options={"depth": 8, "size": (4, 4)})
    assert checked(config) == config
    with pytest.raises(ValueError, match=r"^config\.rate: expected a number above 0 and below 1, got 2\.0$"):
        checked(Limited(rate=2.0))


def test_yaml_cannot_read_the_environment_unless_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOME_SECRET", "value")
    path = tmp_path / "a.yaml"
    path.write_text("a: ${oc.env:SOME_SECRET}\nb: x-${oc.env:NOT_THERE,other}\n")
    with pytest.raises(ValueError, match=r"a\.yaml\.a: expected no \$\{oc\.env:\.\.\.\}") as raised:
        read_yaml(path)
    assert "value" not in str(raised.value)
    assert read_yaml(path, allow_env=True) == {"a": "value", "b": "x-other"}
    for resolver in ("oc.decode:1", "oc.create:1", "oc.select:a", "a${b}:1", "oc.env:${b}"):
        path.write_text(f"b: c\na: ${{{resolver}}}\n")
        with pytest.raises(ValueError, match="expected"):
            read_yaml(path, allow_env=True)


def test_interpolations_are_resolved_within_bounds(tmp_path: Path) -> None:
    path = tmp_path / "a.yaml"
    path.write_text(
        "a: {x: 1, y: '${.x}', z: '${..b[1]}'}\nb: [2, '${a.x}', '${b.0}']\nc: 'n${a.x}\\${kept}'\nd: ${a}\n"
    )
    expected = {"x": 1, "y": 1, "z": 1}
    assert read_yaml(path) == {"a": expected, "b": [2, 1, 2], "c": "n1${kept}", "d": expected}
    path.write_text("".join(f"k{i}: ['${{k{i + 1}}}', '${{k{i + 1}}}']\n" for i in range(30)) + "k30: 1\n")
    with pytest.raises(ValueError, match="at most"):
        read_yaml(path)
    for text in ("a: ${b}\nb: ${a}\n", "a: ${.a}\n", "a: ${b}\n", "a: ${......b}\n", "a: [1]\nb: ${a[3]}\n"):
        path.write_text(text)
        with pytest.raises(ValueError, match="expected an interpolation"):
            read_yaml(path)


@pytest.mark.parametrize(
    "text",
    [
        "a: &a [1, 1, 1, 1]\n" + "".join(f"{c}: &{c} [*{p}, *{p}, *{p}, *{p}]\n" for p, c in pairwise("abcdefghijkl")),
        "a: &a [*a]\n",
        "a: " + "[" * 5000 + "]" * 5000 + "\n",
        "a: !!python/object/apply:os.system ['true']\n",
        "a: !!python/object/apply:pathlib.PosixPath ['x']\n",
        "a: .nan\n",
        "a: 1e999\n",
        "a: 2001-01-01\n? [b]\n: 1\n",
        "a: " + "9" * 5000 + "\n",
        "a: ???\n",
        "a: 1\na: 2\n",
        "3\n",
    ],
)
def test_yaml_of_any_kind_is_a_mapping_or_one_sentence(tmp_path: Path, text: str) -> None:
    path = tmp_path / "a.yaml"
    path.write_text(text)
    with pytest.raises(ValueError, match="expected") as raised:
        read_yaml(path)
    assert "\n" not in str(raised.value)


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
