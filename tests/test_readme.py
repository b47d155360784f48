"""README is true: its Python runs, its shell lines parse, what it points at exists."""

import re
import shlex
from pathlib import Path

import pytest

from tests.cases import ROOT
from tokenizers_mm.cli import main
from tokenizers_mm.data.photographs import fixed_crops
from train.config import read_config
from train.loop import run

TEXT = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", TEXT, re.S)


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which the demo has been run, two steps long, and a picture lies."""
    folder = tmp_path_factory.mktemp("readme")
    config = ROOT / "configs" / "demo.yaml"
    state = run(
        read_config(str(config), [f"out={folder / 'training'}", "steps=2", "max_seconds=0", "objective.data.workers=0"])
    )
    state.averaged.save(folder / "runs" / "demo" / "tokenizer")
    (folder / "pictures").mkdir()
    for index, crop in enumerate(fixed_crops("heldout", 2, 90)):
        crop.save(folder / "pictures" / f"{index}.png")
    fixed_crops("heldout", 1, 90)[0].save(folder / "picture.png")
    return folder


def test_python_runs(workplace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(workplace)
    python = blocks("python")
    assert python
    for block in python:
        exec(compile(block, "README.md", "exec"), {})


def test_commands_run(workplace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Lines of `tokenizers-mm`, all but the long ones; training with two steps."""
    monkeypatch.chdir(workplace)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    lines = [line for block in blocks("bash") for line in block.splitlines() if line.startswith("tokenizers-mm ")]
    assert len(lines) >= 4
    for line in lines:
        arguments = shlex.split(line, comments=True)[1:]
        if arguments[0] == "demo":
            continue
        if arguments[0] == "train":
            if arguments[1].startswith("configs/"):
                arguments[1:2] = [str(ROOT / arguments[1]), "out=trained"]
            arguments += ["steps=2", "objective.data.workers=0"]
        assert main(arguments) == 0, line


def test_makefile_has_the_two_commands() -> None:
    makefile = (ROOT / "Makefile").read_text()
    for target in ("demo", "test"):
        assert f"make {target}" in TEXT
        assert re.search(rf"^{target}:", makefile, re.M)


def test_links_and_the_map_point_at_what_exists() -> None:
    for link in re.findall(r"\]\(([^)#]+)\)", TEXT):
        if "://" not in link:
            assert (ROOT / link).exists(), link
    for place in re.findall(r"^([\w/]+/)\s{2,}\S", "\n".join(blocks("text")), re.M):
        assert (ROOT / place).is_dir() or (ROOT / "tokenizers_mm" / place).is_dir(), place
