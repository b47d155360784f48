"""A save over an earlier one: the old tokenizer or the new one after a kill at any move, never a mix."""

import itertools
import json
import os
import shutil
import threading
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any, NoReturn

import pytest
import torch
from safetensors.torch import load_file, save_file

from benchmarks.tiny import dualvitok_config as tiny_dualvitok
from benchmarks.tiny import tokenflow_config as tiny_tokenflow
from tests.mar_cases import tiny_config as tiny_mar
from tokenizers_mm import load
from tokenizers_mm._files import REPLACING
from tokenizers_mm._summary import describe, read_lines, save_id
from tokenizers_mm.config import to_mapping
from tokenizers_mm.models import MAR, DualViTok, ImageTokenizer, Provenance, TokenFlow
from tokenizers_mm.models.saving import summarize


def two(family: str) -> tuple[ImageTokenizer[Any], ImageTokenizer[Any]]:
    """Two tokenizers whose weights have the same names and shapes, and whose configurations differ."""
    if family == "mar":
        configs: list[Any] = [tiny_mar(), replace(tiny_mar(), latent_scale=0.5)]
    elif family == "tokenflow":
        configs = [tiny_tokenflow(), tiny_tokenflow()]
    else:
        configs = [tiny_dualvitok(), tiny_dualvitok()]
    model = {"mar": MAR, "tokenflow": TokenFlow, "dualvitok": DualViTok}[family]
    made = []
    for index, config in enumerate(configs):
        torch.manual_seed(index)
        tokenizer = model.from_config(config).eval()
        tokenizer.provenance = Provenance(source=f"save {index}")
        made.append(tokenizer)
    return made[0], made[1]


def which(tokenizer: ImageTokenizer[Any], candidates: tuple[ImageTokenizer[Any], ...]) -> int:
    """The number of the candidate that this tokenizer is, in configuration, provenance and every weight."""
    for index, other in enumerate(candidates):
        here, there = tokenizer.state_dict(), other.state_dict()
        if (
            tokenizer.config == other.config
            and tokenizer.provenance == other.provenance
            and all(torch.equal(here[name], there[name]) for name in there)
        ):
            return index
    raise AssertionError("a mix of two saves")


def fork() -> int:
    """A child that only saves needs none of the parent's threads."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        return os.fork()


def save_and_end(tokenizer: ImageTokenizer[Any], folder: Path, moves: int) -> NoReturn:
    """Save in this process, and end it without notice before move number `moves`."""
    counts, move = itertools.count(), os.replace

    def counted(*arguments: Any) -> None:
        if next(counts) == moves:
            os._exit(9)
        move(*arguments)

    os.replace = counted  # pyright: ignore[reportAttributeAccessIssue]
    tokenizer.save(folder)
    os._exit(0)


@pytest.mark.parametrize("family", ["tokenflow", "dualvitok", "mar"])
def test_killed_at_every_move(family: str, tmp_path: Path) -> None:
    """A child process ends without notice at its k-th move, for every k."""
    pair = two(family)
    seen = []
    for moves in range(100):
        folder = tmp_path / str(moves)
        pair[0].save(folder)
        child = fork()
        if child == 0:
            save_and_end(pair[1], folder, moves)
        ended = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        shutil.copytree(folder, tmp_path / "copy")  # what a backup sees must load too
        seen.append(which(load(folder), pair))
        assert which(load(tmp_path / "copy"), pair) == seen[-1]
        assert not (folder / REPLACING).exists()
        pair[0].save(folder)
        assert sorted(path.name for path in folder.iterdir()) == sorted(
            ("config.json", "model.safetensors", "preprocessor_config.json", "README.md")
        )
        shutil.rmtree(tmp_path / "copy")
        if ended == 0:
            break
    assert seen == sorted(seen)
    assert set(seen) == {0, 1}
    assert len(seen) >= 8, "four files written, the set committed, four files moved"


def test_files_of_two_saves_are_one_sentence(tmp_path: Path) -> None:
    for name, tokenizer in zip("ab", two("mar"), strict=True):
        tokenizer.save(tmp_path / name)
    (tmp_path / "a" / "config.json").write_bytes((tmp_path / "b" / "config.json").read_bytes())
    with pytest.raises(ValueError, match=r"expected config.json and model.safetensors of one save, got files of two"):
        load(tmp_path / "a")


def test_directories_without_the_mark_still_load(tmp_path: Path) -> None:
    """Those of earlier versions, and weights that somebody wrote with safetensors alone."""
    pair = two("mar")
    pair[0].save(tmp_path)
    save_file(pair[0].state_dict(), tmp_path / "model.safetensors")
    assert which(load(tmp_path), pair) == 0
    config = json.loads((tmp_path / "config.json").read_text())
    del config["save_id"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert which(load(tmp_path), pair) == 0


def test_readers_meet_one_save_while_another_is_written(tmp_path: Path) -> None:
    pair = two("mar")
    pair[0].save(tmp_path / "t")
    done = threading.Event()

    def write() -> None:
        for index in range(30):
            pair[index % 2].save(tmp_path / "t")
        done.set()

    thread = threading.Thread(target=write)
    thread.start()
    seen = set()
    while not done.is_set():
        seen.add(which(load(tmp_path / "t"), pair))
    thread.join()
    assert seen <= {0, 1}


@pytest.mark.parametrize("family", ["tokenflow", "dualvitok", "mar"])
def test_info_from_the_files_says_what_loading_says(family: str, tmp_path: Path) -> None:
    """And nothing from the files alone where they were edited, cut or mixed, or come from an older version."""
    pair = two(family)
    pair[0].save(tmp_path / "a")
    pair[1].save(tmp_path / "b")
    loaded = load(tmp_path / "a")
    lines = read_lines(tmp_path / "a")
    assert lines == describe(family, summarize(loaded), to_mapping(loaded.provenance))
    assert lines is not None
    assert f"parameters   {sum(p.numel() for p in loaded.parameters()):,}" in lines
    config, weights = (tmp_path / "a" / name for name in ("config.json", "model.safetensors"))
    whole = config.read_text(), weights.read_bytes()
    data = json.loads(whole[0])
    edits: list[tuple[str, bytes]] = [
        (json.dumps(data | {"format": 2}), whole[1]),
        (json.dumps({name: value for name, value in data.items() if name != "save_id"}), whole[1]),
        (json.dumps({name: value for name, value in data.items() if name not in ("save_id", "summary")}), whole[1]),
        (json.dumps(data | {"summary": 3, "save_id": save_id(data | {"summary": 3})}), whole[1]),
        ("[" * 5000, whole[1]),
        ("[]", whole[1]),
        (whole[0], whole[1][:-1]),
        (whole[0], b""),
        (whole[0], (tmp_path / "b" / "model.safetensors").read_bytes()),
    ]
    for text, content in edits:
        config.write_text(text)
        weights.write_bytes(content)
        assert read_lines(tmp_path / "a") is None
    assert read_lines(tmp_path / "none") is None


@pytest.mark.skipif(torch.cuda.is_available(), reason="a machine with a GPU has the device")
def test_a_missing_device_is_one_sentence(tmp_path: Path) -> None:
    two("mar")[0].save(tmp_path)
    for device in ("cuda", "cuda:7", "nonsense", "meta"):
        with pytest.raises(ValueError, match=f"device: expected cpu .*, got '{device}'"):
            load(tmp_path, device=device)


@pytest.mark.parametrize(
    "change",
    [
        {"provenance": {"source": "\x1b[2J", "license": "", "sha256": "", "notice": ""}},
        {"provenance": {"source": ["x"], "license": "", "sha256": "", "notice": ""}},
        {"family": "\x1b[31mmar"},
        {"summary": {"parameters": "many"}},
        {"summary": {"parameters": 10**30}},
        {"summary": {"image_size": "ab"}},
        {"summary": {"image_size": [True, 1]}},
        {"summary": {"streams": [{"name": "a", "codebook_size": 3, "grids": [["x", 10**12]]}]}},
        {"summary": {"streams": [{"name": "a\x1b", "codebook_size": 3, "grids": [[1, 1]]}]}},
    ],
)
def test_info_believes_no_forged_summary(change: dict[str, Any], tmp_path: Path) -> None:
    """A hash binds the files to each other; anybody can compute it. Nothing of such a file is printed or computed."""
    two("mar")[0].save(tmp_path)
    place = tmp_path / "config.json"
    data = json.loads(place.read_text())
    tensors = load_file(tmp_path / "model.safetensors")
    assert read_lines(tmp_path) is not None
    for key, value in change.items():
        data[key] = {**data[key], **value} if isinstance(value, dict) else value
    data["save_id"] = save_id(data)
    place.write_text(json.dumps(data))
    save_file(tensors, tmp_path / "model.safetensors", metadata={"save_id": data["save_id"]})
    assert read_lines(tmp_path) is None
