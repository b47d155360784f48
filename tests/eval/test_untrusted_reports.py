"""State and reports of evaluations that anybody may have written: read right, or left, or refused with one sentence."""

import copy
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from tests.models.test_vqgan import tiny
from tokenizers_mm.cli import main
from tokenizers_mm.eval.base import Setup
from tokenizers_mm.eval.candidates import Ours, open_candidates
from tokenizers_mm.eval.images import ImageSource
from tokenizers_mm.eval.protocols import protocol_by_name
from tokenizers_mm.eval.report import make_report
from tokenizers_mm.eval.run import PARTIAL, Run, _digest, begin, carry_out, restore, save

JUNK = [None, "x", -1, [], {}, 1e300, 10**30, [1], [[]], {"a": []}, [10**9], True, "<script>alert(1)</script>"]


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("images")
    for index, name in enumerate(("a", "<script>alert(1)<", "b\x1b[2J\n")):
        Image.new("RGB", (16, 16), (80 * index, 20, 90)).save(folder / f"{name}.png")
    return folder


def new(images: Path) -> Run:
    setup = Setup(protocol_by_name("default"))
    return begin([Ours("tiny", tiny())], ImageSource.at(str(images)), setup, ["psnr", "ssim", "bits", "codebook"])


@pytest.fixture(scope="module")
def finished(images: Path) -> Run:
    return carry_out(new(images))


def test_state_of_anybody_is_taken_whole_or_not_at_all(images: Path, finished: Run, tmp_path: Path) -> None:
    """Every fact and every tensor changed, also with a hash that fits: the run begins anew, or is the same."""
    path = tmp_path / PARTIAL
    save(finished, path)
    assert restore(new(images), path)
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    tensors, facts = load_file(path), json.loads(metadata["facts"])

    def taken(facts: str, tensors: dict[str, torch.Tensor], key: str = "sha256") -> bool:
        save_file(tensors, path, metadata={**metadata, "facts": facts, key: _digest(facts, tensors)})
        run = new(images)
        found = restore(run, path)
        assert run.next == (len(run.source) if found else 0)
        assert len(run.used) == run.next
        make_report(run if found else finished)
        return found

    assert taken(metadata["facts"], tensors)
    texts = ["", "x", "[]", "[" * 100_000, *(json.dumps({k: v for k, v in facts.items() if k != key}) for key in facts)]
    assert not any(taken(text, tensors) for text in texts)
    for key in facts:
        for value in JUNK[::3] if key != "seconds" else JUNK:
            if not (key == "digest" and isinstance(value, str)) and not (key == "skipped" and value == []):
                fits = key == "seconds" and value in (1e300, 10**30)
                assert taken(json.dumps({**facts, key: value}), tensors) == fits, (key, value)
    for name, tensor in tensors.items():
        others = [None, torch.zeros(0), torch.zeros(3, 3), tensor.to(torch.complex64), tensor[None]]
        for other in others:
            changed = {key: value for key, value in tensors.items() if key != name or other is not None}
            if other is not None:
                changed[name] = other
            assert not taken(metadata["facts"], changed), (name, other)
    assert not taken(metadata["facts"], {**tensors, "0|psnr|values": tensors["0|psnr|values"] + 1}, key="other")
    path.unlink()
    os.mkfifo(path)
    assert not restore(new(images), path)


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    yield path
    for key, item in (
        value.items() if isinstance(value, dict) else enumerate(value[:1]) if isinstance(value, list) else ()
    ):
        yield from places(item, (*path, key))


def test_reports_of_anybody(finished: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Every place of a report changed or gone: joined, or one sentence; never a script on the page."""
    report = json.loads(json.dumps(make_report(finished)))
    assert all(name.isprintable() for name in report["per_image"]["names"])
    file, out = tmp_path / "report.json", tmp_path / "out"
    paths = [path for path in places(report) if path]
    codes = set()
    for number, path in enumerate(paths):
        for value in (*JUNK[number % 5 :: 5], "nothing"):
            changed = copy.deepcopy(report)
            inner = changed
            for key in path[:-1]:
                inner = inner[key]
            if value == "nothing":
                del inner[path[-1]]
            else:
                inner[path[-1]] = value
            file.write_text(json.dumps(changed))
            code = main(["eval", "--join", str(file), "--out", str(out)])
            captured = capsys.readouterr()
            assert code == 0 or (code == 2 and captured.err.count("\n") >= 1), (path, value, captured.err)
            last = captured.err.splitlines()[-1] if code else ": expected "
            assert ": expected " in last or "unknown key" in last, (path, value, last)
            codes.add(code)
            if code == 0:
                assert "<script>alert" not in (out / "report.html").read_text()
    assert codes == {0, 2}


def test_a_report_and_its_page_are_of_one_run(finished: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A disk that is full when the page is written: both files stay those of the run before."""
    file, out = tmp_path / "report.json", tmp_path / "out"
    file.write_text(json.dumps(make_report(finished)))
    assert main(["eval", "--join", str(file), "--out", str(out)]) == 0
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    assert before.keys() == {"report.json", "report.html"}

    def full(path: Path, _: str) -> None:
        raise OSError(28, "No space left on device", str(path))

    monkeypatch.setattr("tokenizers_mm.cli.eval.write_text", full)
    assert main(["eval", "--join", str(file), str(file), "--out", str(out)]) == 2
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before


def test_reports_of_many_images_are_joined(finished: Run, tmp_path: Path) -> None:
    """A number per image, metric and tokenizer is more than a configuration may have."""
    report = make_report(finished)
    values, count = report["per_image"]["values"]["tiny"], 120_000
    report["per_image"] = {"names": ["a"] * count, "values": {"tiny": {k: v[:1] * count for k, v in values.items()}}}
    (tmp_path / "report.json").write_text(json.dumps(report))
    assert main(["eval", "--join", str(tmp_path), "--out", str(tmp_path / "joined.json")]) == 0


CONFIGS: dict[str, dict[str, Any]] = {
    "a list": {"_class_name": []},
    "a mapping": {"model_type": {}},
    "another class": {"_class_name": "os.system"},
    "a text for widths": {"model_type": "emu3_vqgan", "base_channels": "x"},
    "a number for widths": {"model_type": "janus_vqgan", "channel_multiplier": 3},
    "weights of another model": {
        "model_type": "emu3_vqgan",
        "base_channels": 32,
        "channel_multiplier": [1],
        "num_res_blocks": 1,
        "attn_resolutions": [],
        "codebook_size": 8,
        "embed_dim": 4,
        "latent_channels": 4,
    },
    "negative": {"model_type": "emu3_vqgan", "codebook_size": -1},
}


@pytest.mark.parametrize("kind", CONFIGS)
def test_directories_of_other_libraries_by_anybody(kind: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(CONFIGS[kind]))
    save_file({"x": torch.zeros(1)}, tmp_path / "model.safetensors", metadata={"format": "pt"})

    def load(name: str) -> Any:
        raise AssertionError(name)

    with pytest.raises(ValueError, match="expected") as raised:
        open_candidates([str(tmp_path)], load)
    assert "\n" not in str(raised.value)
