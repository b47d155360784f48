"""`make gpu`, walked on the CPU: its stages, its summary, its files. No time measured here means anything."""

import json
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from benchmarks import gpu, gpu_nearest_code
from tests.cases import ROOT

needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="no g++ on PATH")


def walk(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "benchmarks.gpu", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_without_a_gpu_one_sentence_says_so() -> None:
    done = walk()
    assert done.returncode == 2
    assert done.stdout == "make gpu: torch sees no CUDA device here (GPU_DRY_RUN=1 walks the stages on the CPU)\n"


@needs_compiler
def test_benchmark_stage_on_the_host_model(tmp_path: Path) -> None:
    done = walk("--dry-run", "--stages", "build", "benchmark", "--out", str(tmp_path))
    assert done.returncode == 0, done.stdout + done.stderr
    results = json.loads((tmp_path / "gpu_dry_run.json").read_text())
    assert {"date", "gpu", "torch", "cuda", "triton", "commit"} <= set(results["about"])
    assert [row["case"] for row in results["cases"]] == ["G1", "G1 N=1"]
    for row in results["cases"]:
        assert {"ours", "ours, kept", "chunked addmm fp32", "cdist+argmin"} <= set(row["milliseconds"])
        assert not any(row["wrong"][name] for name in gpu_nearest_code.EXACT if name in row["wrong"])
    assert "| ours, margin |" in (tmp_path / "gpu_dry_run.md").read_text()


@needs_compiler
@pytest.mark.full
def test_every_stage_on_the_host_model(tmp_path: Path) -> None:
    done = walk("--dry-run", "--out", str(tmp_path))
    assert done.returncode == 0, done.stdout + done.stderr
    summary = done.stdout.partition("dry run):\n")[2].splitlines()
    assert [line.split()[:2] for line in summary] == [[name, "passed"] for name in gpu.STAGES]


@pytest.fixture
def stages(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> dict:
    monkeypatch.setattr(gpu, "WORK", tmp_path)
    table: dict = {}
    monkeypatch.setattr(gpu, "STAGES", table)
    return table


def fail(run: gpu.Run, seconds: float) -> str:
    raise gpu.StageError("3 failed")


def skip(run: gpu.Run, seconds: float) -> str:
    raise gpu.SkippedError("nothing to run")


def test_a_failing_stage_stops_no_other(stages: dict, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    stages |= {"tests": (fail, 60), "sanitizer": (skip, 60), "training": (lambda run, seconds: "20 steps", 60)}
    assert gpu.main(["--dry-run"]) == 1
    lines = [line.split() for line in (tmp_path / "summary.txt").read_text().splitlines()[2:]]
    assert [line[:2] for line in lines] == [["tests", "FAILED"], ["sanitizer", "skipped"], ["training", "passed"]]
    assert "3 failed" in capsys.readouterr().out


def test_without_a_library_nothing_is_run_over_it(stages: dict, tmp_path: Path) -> None:
    stages |= {"build": (fail, 60), "tests": (lambda run, seconds: "never", 60)}
    assert gpu.main(["--dry-run"]) == 1
    assert "there is no library" in (tmp_path / "summary.txt").read_text()


def test_missing_packages_are_named(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(gpu, "NEEDED", {"torch": "torch", "no_such_module": "its-wheel"})
    assert gpu.main([]) == 2
    assert capsys.readouterr().out.endswith("carry the wheels of: its-wheel\n")


def test_a_command_ends_when_its_time_is_up(stages: dict, tmp_path: Path) -> None:
    run = gpu.Run(True, tmp_path, (9, 0), time.monotonic() + 3)
    begin = time.monotonic()
    code, text = run.python("sleep", ["-c", "import time; print('begun', flush=True); time.sleep(60)"], 60)
    assert code == 124
    assert "begun" in text
    assert time.monotonic() - begin < 30
    assert "stopped after" in (tmp_path / "sleep.log").read_text()


def test_table_puts_the_best_peer_beside_ours() -> None:
    case = {"case": "G1", "data": "gauss", "n": 1000, "k": 1000, "d": 500, "sample": 512, "notes": ["cuVS: missing"]}
    times = {"ours": {"call": 4.0, "device": 2.0}, "ours, kept": {"call": 3.0, "device": 1.0}}
    times |= {"cdist+argmin": {"call": 8.0, "device": 6.0}, "slow": {"call": 9.0}}
    row = {**case, "milliseconds": times, "wrong": dict.fromkeys(times, 0)}
    about = {"gpu": "Some GPU", "date": "today", "cuda": "13.0", "torch": "2.11", "triton": None, "commit": None}
    ceilings = {"bf16_tflops": 10.0, "copy_tb_per_s": 3.0}
    text = gpu_nearest_code.report({"about": about, "ceilings": ceilings, "cases": [row], "notes": ["Not run: G2."]})
    assert "| G1 | gauss | 1000 | 1000 | 500 | 2.0000 | 1.0000 | cdist+argmin | 3.00 | 6.00 | 10.0% |" in text
    assert "| slow |  | 9.0000 | 4.50 | 0 |" in text
    assert "cuVS: missing" in text
    assert text.endswith("Not run: G2.\n")
