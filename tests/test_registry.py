"""Parts of the caller's own in the tables of the library, from Python and by --import."""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import pytest

import tokenizers_mm as tmm
from tests.tables import kept_tables
from tokenizers_mm import registry
from tokenizers_mm.cli import main
from tokenizers_mm.cli.imports import split_imports
from tokenizers_mm.eval.base import Metric
from tokenizers_mm.models import MODELS, TokenFlow
from tokenizers_mm.quantizers import QUANTIZERS, Quantizer


@pytest.fixture(autouse=True)
def tables() -> Iterator[None]:
    with kept_tables():
        yield


def quantizer(kind: str) -> Any:
    @dataclass(frozen=True)
    class Config:
        dim: int = 4
        kind: str = "mine"

    Config.__dataclass_fields__["kind"].default = kind
    Config.kind = kind
    return type("Mine", (Quantizer,), {"Config": Config})


def test_every_table_is_there_and_takes_an_entry() -> None:
    class Mine(TokenFlow):
        family = "mine"

    @dataclass(frozen=True)
    class Config:
        kind: Literal["mine"] = "mine"

    entries = {
        "family": Mine,
        "quantizer": quantizer("mine"),
        "objective": type("Objective", (), {"kind": "mine", "Config": Config}),
        "metric": type("Mine", (Metric,), {"name": "mine", "label": "Mine"}),
    }
    for kind, spec in registry.KINDS.items():
        entry = entries.get(kind, lambda *_: None)
        assert tmm.register(kind, "mine", entry) is entry
        assert registry._table(spec)["mine"] is entry
    assert MODELS["mine"] is Mine
    assert "mine" in QUANTIZERS


def test_a_decorator() -> None:
    @tmm.register("loss", "edges")
    def edges(x: Any, output: Any) -> Any:
        return x

    assert registry._table(registry.KINDS["loss"])["edges"] is edges
    assert edges(3, None) == 3


def test_names_that_are_taken_or_bad() -> None:
    for _ in range(2):  # as a cell of a notebook that runs again

        @tmm.register("loss", "edges")
        def edges(x: Any, output: Any) -> Any:
            return x

    def other(x: Any, output: Any) -> Any:
        return x

    with pytest.raises(ValueError, match=r"name: expected a loss that is not there yet .*edges.*, got edges"):
        tmm.register("loss", "edges", other)
    with pytest.raises(ValueError, match="name: expected a family that is not there yet"):
        tmm.register("family", "tokenflow", type("Mine", (TokenFlow,), {"family": "tokenflow"}))
    for name in ("", "Mine", "my-loss", "1st", "a.b"):
        with pytest.raises(ValueError, match="name: expected lower case letters"):
            tmm.register("loss", name, other)
    with pytest.raises(ValueError, match="kind: expected one of family, quantizer, loss"):
        tmm.register("model", "mine", other)


@pytest.mark.parametrize(
    ("kind", "value", "message"),
    [
        ("loss", 3, "loss 'mine': expected a class or a function"),
        ("family", dict, "family 'mine': expected a subclass of ImageTokenizer"),
        ("family", TokenFlow, "family 'mine': family: expected 'mine', got 'tokenflow'"),
        ("quantizer", lambda: None, "quantizer 'mine': expected a subclass of Quantizer"),
        ("quantizer", type("Mine", (Quantizer,), {}), "quantizer 'mine': expected a dataclass as its Config"),
        ("metric", type("Mine", (Metric,), {"name": "other"}), "metric 'mine': name: expected 'mine', got 'other'"),
        ("objective", type("Mine", (), {"kind": "mine"}), "objective 'mine': expected a dataclass as its Config"),
    ],
)
def test_values_that_are_not_of_the_kind(kind: str, value: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tmm.register(kind, "mine", value)


def test_configurations_name_what_was_registered() -> None:
    from tokenizers_mm.config import from_mapping
    from tokenizers_mm.data.sources import SourceConfig
    from tokenizers_mm.models.tokenflow import TokenFlowConfig
    from train.config import objective_class

    source: dict[str, Any] = {"kind": "mine", "path": "somewhere"}
    with pytest.raises(ValueError, match=r"config.kind: expected one of \['folder', .*\], got mine"):
        from_mapping(SourceConfig, source)
    tmm.register("source", "mine", lambda config: None)
    assert from_mapping(SourceConfig, source).kind == "mine"
    objective = type("Objective", (), {"kind": "mine", "Config": SourceConfig})
    with pytest.raises(ValueError, match=r"config.objective.kind: expected one of \['joint', .*\], got mine"):
        objective_class("mine")
    tmm.register("objective", "mine", objective)
    assert objective_class("mine") is objective
    (mark,) = TokenFlowConfig.__annotations__["quantizer"].__metadata__
    with pytest.raises(ValueError, match=r"where.kind: expected one of .*, got mine"):
        mark.convert({"kind": "mine"}, "where")
    tmm.register("quantizer", "mine", quantizer("mine"))
    assert mark.convert({"kind": "mine", "dim": 3}, "where").dim == 3


def test_the_option_is_found_anywhere() -> None:
    given = ["encode", "--import", "a.py", "x.png", "--import=b.py", "--out", "y"]
    assert split_imports(given) == (["encode", "x.png", "--out", "y"], ["a.py", "b.py"])
    assert split_imports(["encode", "--import"]) == (["encode"], [""])


def test_a_file_is_run_once_and_only_when_it_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.syspath_prepend(str(tmp_path))
    file = tmp_path / "my_parts_of_a_test.py"
    file.write_text("import tokenizers_mm as tmm\n@tmm.register('loss', 'from_file')\ndef f(x, output): return x\n")
    assert main(["configs", "debug"]) == 0
    assert "from_file" not in registry._table(registry.KINDS["loss"])
    for _ in range(2):
        assert main(["configs", "--import", str(file), "debug"]) == 0
        assert "from_file" in registry._table(registry.KINDS["loss"])
    capsys.readouterr()
    (tmp_path / "broken_of_a_test.py").write_text("import nothing_of_this_name\n")
    (tmp_path / "json.py").write_text("")
    (tmp_path / "text.txt").write_text("")
    (tmp_path / "loop.py").symlink_to("loop.py")
    os.mkfifo(tmp_path / "fifo.py")
    for name, message in [
        ("missing.py", "expected a Python file, got no such file"),
        ("broken_of_a_test.py", "expected a Python file that runs, got ModuleNotFoundError"),
        ("json.py", "expected a name that no other module has, got json"),
        ("text.txt", "expected a file whose name is that of a module"),
        ("loop.py", "expected a Python file, got Too many levels of symbolic links"),
        ("fifo.py", "expected a Python file, got a FIFO"),
    ]:
        assert main(["configs", "debug", "--import", str(tmp_path / name)]) == 2
        said = capsys.readouterr().err
        assert message in said
        assert len(said.splitlines()) == 1
