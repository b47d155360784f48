"""Blocks of Markdown pages, and a folder in which they run: photographs, a small tokenizer, a tiny language model."""

import functools
import re
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

import tokenizers_mm as tmm
from tests.cases import ROOT, case
from tests.weights_by_rule import tokenflow_weights
from tokenizers_mm.cli import main
from tokenizers_mm.data.photographs import fixed_crops

SMALL = ("steps=2", "batch_size=2", "accumulate=1", "objective.data.workers=0", "save_every=1", "log_every=1",
         "sample_every=0", "ema=0", "objective.revival.every=0")  # fmt: skip
"""Values that make a training run of a page quick, after its own."""

PROGRAMS = {"pip", "make", "accelerate"}
"""Programs of shell lines that are not run: installers, and those that start many processes."""


PUBLISHED = case("tokenflow/clipb_256_enhanced")
"""A small model with the names of a published file."""


@dataclass(frozen=True)
class Block:
    """A fenced block. heading: the nearest one above it."""

    language: str
    text: str
    heading: str


def blocks(text: str) -> list[Block]:
    """All fenced blocks of a page, in order."""
    found, heading = [], ""
    for match in re.finditer(r"^#+ (?P<heading>[^\n]*)$|^```(?P<language>\w*)\n(?P<text>.*?)^```$", text, re.S | re.M):
        if match["heading"] is not None:
            heading = match["heading"]
        else:
            found.append(Block(match["language"], match["text"], heading))
    return found


def pages() -> list[Path]:
    """All pages of the documentation."""
    return sorted((ROOT / "docs").glob("*.md"))


def file_name(block: Block) -> str | None:
    """The file that a block is to be written to: its first line is a comment that names it."""
    match = re.match(r"# ([\w./-]+\.(?:py|yaml))\n", block.text)
    return match[1] if match else None


def run_page(path: Path) -> None:
    """Run all blocks of a page in order, in the current folder; first those of the page that it says it needs."""
    text = path.read_text(encoding="utf-8")
    for needed in re.findall(r"<!-- needs ([\w.]+) -->", text):
        run_page(path.with_name(needed))
    names: dict[str, Any] = {}
    for block in blocks(text):
        name = file_name(block)
        if name is not None:
            Path(name).write_text(block.text, encoding="utf-8")
        elif block.language == "python":
            exec(compile(block.text, path.name, "exec"), names)
        elif block.language == "bash":
            for line in block.text.splitlines():
                run_line(line)


def run_line(line: str) -> None:
    """Run a line of a shell block in this process, with few steps where it trains."""
    arguments = shlex.split(line, comments=True)
    if not arguments or arguments[0] in PROGRAMS:
        return
    assert arguments[0] == "tokenizers-mm", line
    arguments = arguments[1:]
    if arguments[0] == "convert" and "--list" not in arguments:
        arguments += ["--config", str(PUBLISHED.folder / "config.json")]
    if arguments[0] == "train" and "--check" not in arguments:
        own = {word.partition("=")[0] for word in arguments if "=" in word}
        arguments += [value for value in SMALL if value.partition("=")[0] not in own]
    assert main(arguments) == 0, line
    if arguments[0] == "train":
        from accelerate.state import AcceleratorState

        AcceleratorState._reset_state(True)


def make_workplace(folder: Path) -> None:
    """Make the files that the pages take for granted: photos/, my_tokenizer/ and a published checkpoint."""
    (folder / "photos").mkdir(parents=True)
    for index, crop in enumerate(fixed_crops("heldout", 4, 96)):
        crop.resize((96 + 8 * index, 80)).save(folder / "photos" / f"{index}.png")
    (folder / "photos" / "broken.jpg").write_bytes(b"no image")
    tmm.load("tokenizers_mm/demo-64").save(folder / "my_tokenizer")
    torch.save(tokenflow_weights(PUBLISHED), folder / "tokenflow_clipb_32k_enhanced.pt")


def make_language_model(folder: Path) -> None:
    """A tiny Qwen3 and its text tokenizer, under the name that the hub has for a larger one."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    from tests.llm.fakes import words

    place = folder / "Qwen" / "Qwen3-0.6B"
    text = words(["draw a photograph . this is a what ? Draw This What A :"])
    text.save_pretrained(str(place))
    torch.manual_seed(0)
    end: Any = text.eos_token_id
    sizes: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1}
    heads: dict[str, Any] = {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16}
    config: Any = Qwen3Config(vocab_size=len(text), max_position_embeddings=1024, eos_token_id=end, **sizes, **heads)
    Qwen3ForCausalLM(config).save_pretrained(place)


def quick_compile(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch.compile with the backend that traces and differentiates, and leaves out the compiler of C++."""
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
