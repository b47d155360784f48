"""Commands that texts name exist: docstrings, comments, configurations, pages, the Makefile, the CI's scripts.

Every module, verb and target that stands somewhere is there, its parser takes the options beside it, and its
key=value words fit the configuration. Nothing is run.
"""

import argparse
import ast
import importlib
import io
import json
import re
import shlex
import subprocess
import tokenize
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, NoReturn
from unittest import mock

import pytest

from tests.cases import ROOT
from tokenizers_mm.cli import VERBS
from tokenizers_mm.cli import parser as verbs_parser
from tokenizers_mm.cli.imports import OPTION as IMPORT
from tokenizers_mm.cli.imports import split_imports
from tokenizers_mm.config import to_mapping
from train.config import read_config
from train.presets import make_preset

PLACEHOLDER = "1"
"""Value of what usage writes in upper case: text and a number at once."""

CONFIGS = ROOT / "configs"

OURS = ("benchmarks", "tests", "tokenizers_mm", "train")
TRAINING = {"train", "tokenizers_mm.train", "tokenizers-mm train"}
"""Names of the training program."""

HEAD = re.compile(
    r"(?:\bpython[0-9.]*|(?<=\$\(RUN\))|(?<=\$\(PYTHON\)\))|\baccelerate launch\b[^`]*?) -m (?P<module>\w[\w.]*\w)"
    r"|\btokenizers-mm (?P<verb>[a-z][\w-]*)|\bmake (?P<target>[a-z][\w-]*)"
)
SPAN = re.compile(r"(?<!`)`([^`]+)`(?!`)")
OPTION = re.compile(r"(?<![\w-])--[a-z][\w-]*")
OVERRIDE = re.compile(r"[a-z][\w.]*=")
KEY = re.compile(r"\bobjective(?:\.[a-z]\w*)+(?:=[^\s`]*[^\s`).,;:])?")
OTHERS = {IMPORT, "--finetune_decoder", "--num_processes"}
"""Options that no parser knows: one of every verb, and those of TokenFlow's released scripts and of accelerate."""

REGISTERING = "docs/extending.md"
"""A page that registers what its keys name."""


@dataclass(frozen=True)
class Text:
    """A piece of prose or code. code: its lines are commands, so that `make` begins one."""

    place: str
    words: str
    code: bool = False


@dataclass(frozen=True)
class Command:
    """A command where it stands. name: a module, `tokenizers-mm VERB` or `make TARGET`."""

    place: str
    name: str
    words: str


def tracked() -> list[Path]:
    """Files of the checkout that are texts of ours."""
    found = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True)
    names = [name for name in found.stdout.splitlines() if not name.startswith(("tests/fixtures/", "tests/data/"))]
    return [ROOT / name for name in names]


def texts(path: Path) -> Iterator[Text]:
    """Pieces of a file in which a command can stand."""
    place, ending = str(path.relative_to(ROOT)), path.suffix
    if ending == ".py":
        yield from python_texts(place, path.read_text(encoding="utf-8"))
    elif ending == ".md":
        yield from page_texts(place, path.read_text(encoding="utf-8"))
    elif ending == ".ipynb":
        for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]:
            yield from page_texts(place, "".join(cell["source"]))
    elif ending in (".yaml", ".yml", ".toml", ".cpp", ".cu", ".cuh", ".h", ".cmake", ".txt") or path.name == "Makefile":
        plain = re.sub(r"^[ \t]*(?:#|//) ?", "", path.read_text(encoding="utf-8"), flags=re.M)
        yield Text(place, plain)
    elif path.parent.name == ".ci":
        yield Text(place, path.read_text(encoding="utf-8"), True)


def page_texts(place: str, page: str) -> Iterator[Text]:
    """Fenced blocks, and the prose between them."""
    fence = re.compile(r"^```\w*\n(.*?)^```$", re.S | re.M)
    for block in fence.findall(page):
        yield Text(place, block, True)
    yield Text(place, fence.sub("", page))


def python_texts(place: str, source: str) -> Iterator[Text]:
    """Comments and strings; of a test the docstrings alone, since its other strings may be wrong on purpose."""
    if not HEAD.search(source) and not OPTION.search(source) and not KEY.search(source):
        return
    comments = [t for t in tokenize.generate_tokens(io.StringIO(source).readline) if t.type == tokenize.COMMENT]
    yield Text(place, "\n".join(t.string.lstrip("# ") for t in comments))
    for node in ast.walk(ast.parse(source)):
        match node:
            case ast.Expr(ast.Constant(str(words))):
                yield Text(f"{place}:{node.lineno}", words)
            case ast.JoinedStr() | ast.Constant(str()) if not place.startswith("tests/"):
                parts = node.values if isinstance(node, ast.JoinedStr) else [node]
                words = "".join(str(part.value) if isinstance(part, ast.Constant) else "X" for part in parts)
                if HEAD.search(words):
                    yield Text(f"{place}:{node.lineno}", words)


def commands(text: Text) -> Iterator[Command]:
    """Commands of a text: in backticks, as lines of their own, and named in passing."""

    def found(words: str, whole: bool) -> Iterator[Command]:
        for head in HEAD.finditer(words):
            tail = re.split(r"\s#|\s\d?>|[;`&)]|\s\|\s(?![^\[]*\])", words[head.end() :])[0]
            if not whole and not re.match(r"\s+\[?-", tail):
                tail = ""
            name = head["module"] or (head["verb"] and f"tokenizers-mm {head['verb']}") or f"make {head['target']}"
            yield Command(text.place, name, tail.rstrip(". \n"))

    for span in SPAN.findall(text.words):
        yield from found(" ".join(span.split()), True)
    joined = re.sub(r"\\\n\s*|\n[ \t]+(?=\[?--)", " ", SPAN.sub("", text.words))
    for line in joined.splitlines():
        begins = re.match(r"\s*(?:[A-Z_]+=\S+ +)*(?:timeout \d+ )?(?:python|tokenizers-mm|make|accelerate) ", line)
        for command in found(line, bool(begins) and (text.code or line.startswith("    "))):
            if text.code or not command.name.startswith("make "):
                yield command


class FoundParserError(Exception):
    """Raised in place of parsing, with the parser."""


def stop(parser: argparse.ArgumentParser, *_: Any, **__: Any) -> NoReturn:
    raise FoundParserError(parser)


@cache
def parser_of(name: str) -> argparse.ArgumentParser | None:
    """The parser of a module or verb of ours; None where it reads its arguments by itself."""
    if name in TRAINING:
        name = "tokenizers-mm train"
    if name.startswith("tokenizers-mm "):
        (verbs,) = (a for a in verbs_parser()._actions if isinstance(a, argparse._SubParsersAction))
        return verbs.choices[name.split()[1]]
    if not re.search(r"ArgumentParser\(|harness\.parser\(", file_of(name).read_text()):
        return None
    module = importlib.import_module(name if file_of(name).stem != "__main__" else f"{name}.__main__")
    with (
        mock.patch.object(argparse.ArgumentParser, "parse_known_args", stop),
        pytest.raises(FoundParserError) as caught,
    ):
        module.main([])
    return caught.value.args[0]


def file_of(module: str) -> Path:
    """The file that `python -m` runs, whether it is there or not."""
    folder = ROOT / module.replace("tokenizers_mm.train", "train").replace(".", "/")
    return folder / "__main__.py" if folder.is_dir() else folder.with_suffix(".py")


def wrong(command: Command) -> str | None:
    """A sentence on what is wrong with a command, if anything is."""
    kind, _, target = command.name.partition(" ")
    if kind == "make":
        there = re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), re.M)
        return None if there else "there is no such target"
    name, words = command.name, command.words
    if name == "tokenizers_mm.cli":
        verb, _, words = words.strip().partition(" ")
        kind, target, name = "tokenizers-mm", verb, f"tokenizers-mm {verb}"
        if not re.match(r"[a-z]", verb):
            return None
    if kind == "tokenizers-mm":
        if target not in VERBS:
            return "there is no such verb"
    elif name.split(".")[0] not in OURS:
        return None
    elif not file_of(name).is_file() or "__main__" not in file_of(name).read_text():
        return "there is no such program"
    return wrong_arguments(name, words)


def wrong_arguments(name: str, words: str) -> str | None:
    """Complaint of a program's parser or configuration about arguments. Upper-case words and brackets are usage."""
    plain = re.sub(r"(?<=\w)\|[\w|]+", "", re.sub(r"\[(?!\])|(?<!\[)\]|\.\.\.| \| ", " ", words))
    tokens = [re.sub(r"^[A-Z][A-Z_]+$|^[NKX]$", PLACEHOLDER, token) for token in shlex.split(plain)]
    tokens, files = split_imports([token for token in tokens if token not in ("--help", "key=value", "$1")])
    parser = parser_of(name)
    if parser is None or not tokens:
        return None
    overrides = [token for token in tokens if OVERRIDE.match(token)] if name != "train.demo.shipped" else tokens[1:]
    try:
        with (
            mock.patch.object(argparse.ArgumentParser, "error", refuse),
            mock.patch.object(argparse.ArgumentParser, "_check_value", check_choice),
        ):
            options = parser.parse_intermixed_args(tokens)
        if overrides and not files:
            check_overrides(options.words, options.preset, overrides)
    except ValueError as error:
        return None if "arguments are required" in str(error) else str(error)
    return None


def refuse(parser: argparse.ArgumentParser, message: str) -> NoReturn:
    raise ValueError(message)


def check_choice(parser: argparse.ArgumentParser, action: argparse.Action, value: Any) -> None:
    if action.choices is not None and value not in (*action.choices, PLACEHOLDER):
        refuse(parser, f"{action.option_strings}: {value} is none of {list(action.choices)}")


def check_overrides(words: Sequence[str], preset: str | None, overrides: list[str]) -> None:
    """Read the configuration with its overrides. A file that a reader makes can be after any that is shipped."""
    if preset is not None:
        make_preset(preset, overrides)
        return
    (named,) = [word for word in words if word not in overrides]
    shipped = CONFIGS / f"{Path(named).stem}.yaml"
    if Path(named).parent in (Path("configs"), Path()) and shipped.is_file():
        read_config(str(shipped), overrides)
        return
    errors = []
    for path in sorted(CONFIGS.glob("*.yaml")):
        try:
            read_config(str(path), overrides)
            return
        except ValueError as error:
            errors.append(str(error))
    raise ValueError(errors[0])


def known_keys(value: Any, above: str = "") -> Iterator[str]:
    """Paths of all keys of a plain mapping."""
    if isinstance(value, dict):
        for key, inside in value.items():
            yield f"{above}{key}"
            yield from known_keys(inside, f"{above}{key}.")


def there(name: str) -> bool:
    """True for the dotted name of a module of ours, or of something in one."""
    parts = name.replace("tokenizers_mm.train", "train").split(".")
    for end in range(len(parts), 0, -1):
        place = ROOT.joinpath(*parts[:end])
        if place.is_dir() or place.with_suffix(".py").is_file():
            found: Any = importlib.import_module(".".join(parts[:end]))
            for part in parts[end:]:
                found = getattr(found, part, None)
            return found is not None
    return False


@pytest.fixture(scope="module")
def all_texts() -> list[Text]:
    return [text for path in tracked() for text in texts(path)]


def test_every_command_is_one_that_exists(all_texts: list[Text]) -> None:
    named = {command for text in all_texts for command in commands(text)}
    assert len({command.name for command in named}) > 30
    faults = [f"{c.place}: {c.name}{c.words}: {said}" for c in named if (said := wrong(c))]
    assert not faults, "\n".join(sorted(faults))


def test_every_option_is_one_of_a_program(all_texts: list[Text]) -> None:
    """In prose any program's; in the docstring of a program its own."""
    parsers = {name: parser_of(name) for name in [*modules(), *(f"tokenizers-mm {verb}" for verb in VERBS)]}
    options = {name: set(parser._option_string_actions) for name, parser in parsers.items() if parser}
    known = OTHERS.union(*options.values())
    for text in all_texts:
        place = text.place.partition(":")[0]
        if Path(place).suffix in (".py", ".md", ".yaml", ".ipynb"):
            own = text.place.endswith(".py:1") and options.get(place[:-3].replace("/", "."))
            strange = set(OPTION.findall(text.words)) - (own or known)
            assert not strange, f"{text.place}: {sorted(strange)}"


def test_every_key_is_one_of_a_configuration(all_texts: list[Text]) -> None:
    """Keys with their whole path anywhere; in the comment of a configuration also those below its objective."""
    known = frozenset().union(*(keys_of(path.stem) for path in CONFIGS.glob("*.yaml")))
    for text in all_texts:
        for key in KEY.findall(text.words):
            if "=" not in key:
                assert key in known, f"{text.place}: {key}"
            elif text.place != REGISTERING:
                check_overrides(["any"], None, [key])
    for path in sorted(CONFIGS.glob("*.yaml")):
        header = "".join(line for line in path.read_text().splitlines(True) if line.startswith("#"))
        for key in re.findall(r"(?<![\w./-])(?:model|data|loss|optimizer|revival|validation)(?:\.[a-z]\w*)+", header):
            assert f"objective.{key}" in keys_of(path.stem), f"{path.name}: {key}"


@cache
def keys_of(name: str) -> frozenset[str]:
    """Paths of all keys of a shipped configuration, defaults included."""
    return frozenset(known_keys(to_mapping(read_config(str(CONFIGS / f"{name}.yaml"), []))))


def modules() -> list[str]:
    """Programs of benchmarks/."""
    return [f"benchmarks.{p.stem}" for p in (ROOT / "benchmarks").glob("*.py") if "\ndef main(" in p.read_text()]


def test_every_module_that_is_named_exists(all_texts: list[Text]) -> None:
    dotted = re.compile(r"(?<![\w./-])(?:tokenizers_mm|train|benchmarks)(?:\.[A-Za-z_]\w*)+(?![\w/])")
    named = {(name, text.place) for text in all_texts for name in dotted.findall(text.words)}
    files = (".h", ".yaml", ".py", ".json")
    strange = [f"{place}: {name}" for name, place in named if not name.endswith(files) and not there(name)]
    assert len(named) > 30
    assert not strange, "\n".join(sorted(strange))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("`make sandwiches`", "no such target"),
        ("`tokenizers-mm ecnode photos`", "no such verb"),
        ("`tokenizers-mm encode photos --outt ids.parquet`", "unrecognized arguments: --outt"),
        ("`tokenizers-mm export --format onxn`", "onxn is none of"),
        ("see: python -m benchmarks.no_such_program [--rounds 3].", "no such program"),
        ("Times.\n\n    python -m benchmarks.kmeans [--threads 1 2]\n        [--round_s 3]\n", "--round_s"),
        ("`tokenizers-mm train configs/debug.yaml optimizer.lr=1`", "optimizer"),
        ("`tokenizers-mm train runs/mine/config.yaml save_evry=1`", "save_evry"),
        ("`tokenizers-mm train --preset small objective.data.sizes=1`", "sizes"),
    ],
)
def test_what_is_wrong_is_found(words: str, message: str) -> None:
    (command,) = commands(Text("here", words))
    assert message in str(wrong(command))
