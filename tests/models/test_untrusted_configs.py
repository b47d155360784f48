"""A config.json that anybody may have written: every change of it loads or is refused with one sentence, at once."""

import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import tokenizers_mm as tmm
from tests.mar_cases import tiny_config as mar_config
from tests.models.test_dualvitok import tiny_config as dualvitok_config
from tests.models.test_tokenflow import tiny_config as tokenflow_config
from tokenizers_mm.cli import main
from tokenizers_mm.models import MAR, DualViTok, TokenFlow

FAMILIES: dict[str, Callable[[], Any]] = {
    "dualvitok": lambda: DualViTok.from_config(dualvitok_config()),
    "mar": lambda: MAR.from_config(mar_config()),
    "tokenflow": lambda: TokenFlow.from_config(tokenflow_config()),
}
SECONDS = 5.0


class Raw(str):
    """Text that is written into the JSON as it is."""


VALUES: list[Any] = [
    *(None, True, "", "x", "NaN", "../../x", "hf-hub:owner/name", "x" * 70_000, "\x1b[2J", "\ud800"),
    *(0, -1, 1, 3, 0.5, -0.0, 1e-300, 10**6, 2**31, 10**12, 2**63, Raw("1" * 5000), Raw("1e999"), Raw("-Infinity")),
    *([], {}, [1, 2, 3], [[1]], {"a": 1}, {"kind": []}, Raw("[" * 20_000 + "]" * 20_000), [1] * 100_001),
]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("saved")
    for name, make in FAMILIES.items():
        make().save(folder / name)
    return {name: folder / name for name in FAMILIES}


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The paths of all values of a JSON document, containers before what they hold."""
    yield path
    for key, item in value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ():
        yield from places(item, (*path, key))


def put(document: Any, path: tuple[Any, ...], change: Callable[[Any, Any], Any]) -> Any:
    """A copy of a document after change(container, key)."""
    copy = json.loads(json.dumps(document))
    inner = copy
    for key in path[:-1]:
        inner = inner[key]
    change(inner, path[-1])
    return copy


def mutations(document: dict[str, Any]) -> Iterator[Any]:
    """All changes of single places: another value, one less, one more, two swapped."""
    paths = [path for path in places(document) if path]
    for index, path in enumerate(paths):
        for value in VALUES:
            yield put(document, path, lambda inner, key, value=value: inner.__setitem__(key, value))
        yield put(document, path, lambda inner, key: inner.__delitem__(key))
        yield put(
            document, path, lambda inner, key: inner.update(extra=1) if isinstance(inner, dict) else inner.append(1)
        )
        other = paths[(index * 7 + 1) % len(paths)]
        value = document
        for key in other:
            value = value[key]
        yield put(document, path, lambda inner, key, value=value: inner.__setitem__(key, value))
    yield from ([], 3, None, "text", Raw("{"), Raw(""), Raw("nan"), Raw('{"a": 1, '), Raw("[" * 200_000))


def text(value: Any) -> str:
    """JSON in which `Raw` stands as it is."""
    parts: list[str] = []

    def mark(item: Any) -> Any:
        if isinstance(item, Raw):
            parts.append(item)
            return f"@raw{len(parts) - 1}@"
        if isinstance(item, dict):
            return {key: mark(inner) for key, inner in item.items()}
        return [mark(inner) for inner in item] if isinstance(item, list) else item

    written = json.dumps(mark(value))
    for index, part in enumerate(parts):
        written = written.replace(f'"@raw{index}@"', part)
    return written


def outcome(folder: Path, capsys: pytest.CaptureFixture[str]) -> str:
    """What reading a folder ends in, twice: "loads" or "refused". Anything else is an error of the test."""
    begin, error = time.perf_counter(), None
    try:
        tmm.load(folder)
        result = "loads"
    except ValueError as caught:
        error = caught
    if error is not None:
        message = str(error)
        assert type(error) is ValueError, message
        assert "expected" in message or "unknown key" in message, message
        assert "\n" not in message, message
        assert len(message) < 4000, message[:4000]
        result = "refused"
    code = main(["info", str(folder)])
    seconds = time.perf_counter() - begin
    captured = capsys.readouterr()
    assert code == (0 if result == "loads" else 2)
    assert captured.err.count("\n") == code // 2, captured.err
    assert seconds < 2 * SECONDS, seconds
    return result


def run(folder: Path, step: int, first: int, capsys: pytest.CaptureFixture[str]) -> dict[str, int]:
    """Try every `step`-th change of a saved tokenizer's config.json; how many load and how many are refused."""
    file = folder / "config.json"
    whole = file.read_text()
    counts = {"loads": 0, "refused": 0}
    try:
        for index, change in enumerate(mutations(json.loads(whole))):
            if index % step == first % step:
                file.write_text(text(change), encoding="utf-8")
                try:
                    counts[outcome(folder, capsys)] += 1
                except BaseException as error:
                    raise AssertionError(f"change {index} of {folder.name}: {text(change)[:3000]}") from error
    finally:
        file.write_text(whole)
    return counts


@pytest.mark.parametrize("family", FAMILIES)
def test_changed_configs_load_or_are_refused(
    family: str, saved: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    counts = run(saved[family], 31, 5, capsys)
    assert counts["refused"] > 20
    assert outcome(saved[family], capsys) == "loads"


@pytest.mark.full
@pytest.mark.parametrize("family", FAMILIES)
def test_all_changed_configs_load_or_are_refused(
    family: str, saved: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    counts = run(saved[family], 1, 0, capsys)
    with capsys.disabled():
        print(f"\n{family}: {counts}")
    assert sum(counts.values()) >= 1600
