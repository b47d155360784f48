"""Every program of benchmarks/ runs at its smallest size, and keeps what it measures. No time measured here counts."""

import contextlib
import importlib
import io
import json
import math
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import encode_decode, harness, train_step
from benchmarks.tiny import configured
from tests.cases import ROOT
from tests.mar_cases import tiny_config as tiny_mar_config
from tokenizers_mm.models import MAR

FOLDER = ROOT / "benchmarks"
GPU = {"gpu", "gpu_nearest_code"}
"""Programs that tests/test_gpu_command.py walks."""

SMALLEST: dict[str, list[str]] = {
    "code_sums": ["--shapes", "64x16x4", "--rounds", "1", "--record"],
    "encode_decode": [str(ROOT / "configs" / "vqgan_64.yaml"), "--size", "32", "--rounds", "1", "--record"],
    "grammar": ["--rounds", "1", "--record"],
    "index_backpropagation": ["--shapes", "8x16x4", "--rounds", "1", "--record"],
    "killed_runs": ["--count", "12", "--kills", "1", "--workers", "1", "--shard-size", "4"],
    "kmeans": ["--shapes", "512x16x4", "--rounds", "1", "--record"],
    "mar_cache": ["--prompts", "8", "--steps", "2", "--record"],
    "nearest_code": ["--grid", "V1", "--data", "gauss", "--rows", "16", "--rounds", "1", "--quick", "--record",
                     "--methods", "ours, packed", "ours, margin", "ours float32", "ours, portable", "cdist+argmin",
                     "chunked addmm 4 MB", "FAISS", "vector-quantize-pytorch", "ours as a layer"],
    "nearest_code_shared": ["--shape", "16x64x8x4", "--rounds", "1", "--record"],
    "next_scale": ["--ways", "plain", "--steps", "1", "--scenes", "4", "--held-out", "2", "--record"],
    "quantizers": ["--steps", "2", "--only", "vq", "--crops", "16", "--record"],
    "ssim": ["--side", "32", "--images", "2", "--rounds", "1", "--record"],
    "stable_ids": ["--tokenizers", "vq", "--count", "2", "--variants", "batch 2", "--rounds", "1"],
    "train_quality": ["--steps", "1", "--recipes", "original", "--out", "quality", "--record"],
    "train_step": ["--codebook", "64", "--batch", "1", "--steps", "1", "--record"],
}  # fmt: skip
"""Arguments of the smallest run of each program, which records where there is something to record."""

EXACT = {
    "encode_decode": lambda row: row["case"] != "encode fp32" or row["ids_changed"] == 0,
    "index_backpropagation": lambda row: row["difference"] < 1e-5,
    "killed_runs": lambda row: row["differ"] == [] and row["each once"] and row["images"] == 12,
    "kmeans": lambda row: max(row["inertia"].values()) < 1.001 * min(row["inertia"].values()),
    "mar_cache": lambda row: row["difference"] < 1e-4,
    "nearest_code": lambda row: row["mismatches"] == 0,
    "ssim": lambda row: row["difference"] < 1e-5,
    "stable_ids": lambda row: row.get("differ", 0) == 0,
}
"""Facts of a row beside times, which hold at every size."""


def programs() -> list[str]:
    """Modules of benchmarks/ that are programs."""
    return sorted(path.stem for path in FOLDER.glob("*.py") if "\ndef main(" in path.read_text())


def numbers(value: Any) -> Iterator[float]:
    """All numbers in a row."""
    if isinstance(value, (dict, list)):
        for part in value.values() if isinstance(value, dict) else value:
            yield from numbers(part)
    elif isinstance(value, (int, float)):
        yield value


@pytest.fixture
def results(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Path]:
    """A folder in place of benchmarks/results, which stays as it is; a program's other processes run in this one."""

    def run_here(module: str, arguments: Sequence[str], environment: Mapping[str, str] | None = None) -> list[str]:
        with contextlib.redirect_stdout(io.StringIO()) as said:
            importlib.import_module(module).main(arguments)
        print(said.getvalue(), end="")
        return said.getvalue().splitlines()

    def contents() -> list[tuple[str, int]]:
        return sorted((str(path), path.stat().st_mtime_ns) for path in (FOLDER / "results").rglob("*"))

    before = contents()
    monkeypatch.setattr(harness, "RESULTS", tmp_path / "results")
    monkeypatch.setattr(harness, "PAUSE", 0.0)
    monkeypatch.setattr(harness, "run_alone", run_here)
    monkeypatch.setattr(train_step, "WARM_UP", 0)
    monkeypatch.chdir(tmp_path)
    yield tmp_path / "results"
    assert contents() == before


def test_every_program_has_a_smallest_run() -> None:
    assert set(programs()) == SMALLEST.keys() | GPU


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("name", SMALLEST)
def test_a_program_runs(name: str, results: Path, capsys: pytest.CaptureFixture[str]) -> None:
    module = importlib.import_module(f"benchmarks.{name}")
    module.main(SMALLEST[name])
    said = capsys.readouterr().out
    assert said
    if name in ("killed_runs", "stable_ids"):  # they print their rows
        rows = [json.loads(line) for line in said.splitlines()]
        assert name == "killed_runs" or {row.get("machine") for row in rows} == {"this", "avx2", "no avx", None}
        assert not results.exists()
    elif name == "quantizers":
        rows = json.loads((results / "quantizers.json").read_text())["rows"]
        assert {path.suffix for path in results.iterdir()} == {".json", ".md", ".png"}
    else:
        (path,) = results.iterdir()
        assert path.name == f"{name}.jsonl"
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        assert all({"date", "cpu", "isa", "torch", "commit"} <= row.keys() for row in rows)
    assert rows
    for row in rows:
        assert all(map(math.isfinite, numbers(row)))
        assert name not in EXACT or EXACT[name](row)


def test_configured_builds_what_a_configuration_trains(tmp_path: Path) -> None:
    """Changed keys count; nothing is loaded, even where the file names pretrained towers."""
    with torch.device("meta"):
        path = ROOT / "configs" / "tokenflow_clipb_224.yaml"
        tokenizer: Any = configured(path, "objective.model.config.pixel_decoder.channels=32")
    assert tokenizer.config.pixel_decoder.channels == 32
    assert not tokenizer.training
    message = "objective.model: expected a family and its config, got .*mar_b.yaml"
    with pytest.raises(ValueError, match=message):
        configured(ROOT / "configs" / "mar_b.yaml")
    MAR.from_config(tiny_mar_config()).save(tmp_path / "mar")
    with pytest.raises(ValueError, match="TOKENIZER: expected one with ids"):
        encode_decode.tokenizer_from(str(tmp_path / "mar"), "cpu")


def test_a_part_in_a_process_of_its_own(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Lines of the part are returned and printed; an end with another code than 0 is an error."""
    (tmp_path / "part.py").write_text(
        "import os, sys; print('one'); print(sys.argv[1:]); sys.exit(int(os.environ['END']))"
    )
    for end, said in (("0", ["one", "['a', 'b']"]), ("3", [])):
        around = {"PYTHONPATH": str(tmp_path), "END": end}
        with contextlib.nullcontext() if said else pytest.raises(subprocess.CalledProcessError):
            assert harness.run_alone("part", ["a", "b"], around) == said
        assert capsys.readouterr().out.splitlines() == ["one", "['a', 'b']"]
