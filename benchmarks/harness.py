"""Parts of all benchmarks: options, interleaved timing, peak memory, description of the machine, log of results."""

import argparse
import ctypes
import datetime
import importlib.metadata
import json
import os
import platform
import random
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from tokenizers_mm import kernels

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"


def parser(description: str | None) -> argparse.ArgumentParser:
    """The parser of a benchmark. description: its docstring, which `--help` prints as it stands."""
    made = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--record", action="store_true", help="keep what is measured in benchmarks/results")
    return made


def shape(text: str) -> tuple[int, ...]:
    """Sizes of an option, such as 16384x8192x32."""
    return tuple(map(int, text.split("x")))


CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}
"""The CPU clock, the time of all threads together, is the one to trust on a busy machine, for one thread."""


PAUSE = 0.05
"""Seconds before each timed call. OpenMP's workers spin for a while after a call, on the core the next method needs."""


CAPS = {
    "portable": {
        "ATEN_CPU_CAPABILITY": "default",
        "FAISS_OPT_LEVEL": "generic",
        "FAISS_SIMD_LEVEL": "NONE",
        "MKL_ENABLE_INSTRUCTIONS": "SSE4_2",
        "ONEDNN_MAX_CPU_ISA": "SSE41",
        "OPENBLAS_CORETYPE": "Prescott",
    },
    "avx2": {
        "ATEN_CPU_CAPABILITY": "avx2",
        "FAISS_OPT_LEVEL": "avx2",
        "FAISS_SIMD_LEVEL": "AVX2",
        "MKL_ENABLE_INSTRUCTIONS": "AVX2",
        "ONEDNN_MAX_CPU_ISA": "AVX2",
        "OPENBLAS_CORETYPE": "Haswell",
    },
}
"""Environment that keeps the peers from a stronger instruction set: torch, FAISS of either kind of wheel, BLAS. On
ARM64 there is none."""
CAPS["avx_vnni"] = {**CAPS["avx2"], "ONEDNN_MAX_CPU_ISA": "AVX2_VNNI"}
CAPS["avx512_vnni"] = CAPS["avx512_amx"] = {}


def capped(isa: str) -> dict[str, str]:
    """Environment that has this instruction set as the strongest, of ours and of the peers."""
    return {**CAPS.get(isa, {}), "TOKENIZERS_MM_ISA": isa}


def cap_isa(isa: str, module: str, arguments: Sequence[str]) -> None:
    """Start the benchmark again with this instruction set as the strongest, for ours and for the peers.

    They read the environment when they are loaded, so that it has to be there before. Returns in the new process.
    """
    wanted = capped(isa)
    if any(os.environ.get(name) != value for name, value in wanted.items()):
        command = [sys.executable, "-m", module, *arguments]
        os.execve(sys.executable, command, {**os.environ, **wanted})


def run_alone(module: str, arguments: Sequence[str], environment: Mapping[str, str] | None = None) -> list[str]:
    """Run a part of a benchmark in a process of its own. Prints its lines as they come, and returns them.

    Raises: subprocess.CalledProcessError where it does not end with 0.
    """
    command, lines = [sys.executable, "-m", module, *arguments], []
    around = {**os.environ, **(environment or {})}
    with subprocess.Popen(command, cwd=ROOT, env=around, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        for line in process.stdout:
            print(line, end="", flush=True)
            lines.append(line.rstrip("\n"))
    if process.returncode:
        raise subprocess.CalledProcessError(process.returncode, command)
    return lines


def interleave(
    methods: Mapping[str, Callable[[], Any]], rounds: int, device: str = "cpu", clock: str = "wall"
) -> dict[str, float]:
    """Median milliseconds of each method; every round runs all of them in a new random order, after one warm-up."""
    now = CLOCKS[clock]
    for method in methods.values():
        method()
    order, times = list(methods), {name: [] for name in methods}
    shuffle = random.Random(0).shuffle
    for _ in range(rounds):
        shuffle(order)
        for name in order:
            synchronize(device)
            time.sleep(PAUSE)
            start = now()
            methods[name]()
            synchronize(device)
            times[name].append(1e3 * (now() - start))
    return {name: statistics.median(values) for name, values in times.items()}


def synchronize(device: str) -> None:
    if device.startswith("cuda"):
        torch.cuda.synchronize()


def peak_extra_megabytes(method: Callable[[], Any], device: str = "cpu") -> float | None:
    """Memory a call needs on top of what is there before it. None where the system does not tell."""
    if device.startswith("cuda"):
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        method()
        return (torch.cuda.max_memory_allocated() - before) / 1e6
    try:
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far
        before = status_megabytes("VmRSS")
        method()
        return status_megabytes("VmHWM") - before
    except (OSError, AttributeError):
        return None


def status_megabytes(field: str) -> float:
    """A size that Linux keeps of this process: "VmRSS" is the memory it holds now, "VmHWM" the most it has held."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return float(next(line.split()[1] for line in lines if line.startswith(field))) / 1e3


def machine(device: str = "cpu") -> dict[str, Any]:
    """Processor, versions, commit and date; nothing that names the machine."""
    info: dict[str, Any] = {"date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")}
    info["cpu"] = _cpu_model()
    info["isa"] = kernels.describe()["isa"]
    info["capped"] = {name: os.environ[name] for name in sorted(CAPS["portable"]) if name in os.environ}
    info["torch_isa"] = torch.backends.cpu.get_cpu_capability()
    info["gpu"] = torch.cuda.get_device_name() if device.startswith("cuda") else None
    info["python"] = platform.python_version()
    for package in ("torch", "faiss-cpu", "vector-quantize-pytorch"):
        info[package] = version(package)
    info["commit"] = None
    if shutil.which("git"):
        command = ["git", "rev-parse", "--short", "HEAD"]
        commit = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
        info["commit"] = commit.stdout.strip() or None
    return info


def version(package: str) -> str | None:
    """The installed version of a distribution."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _cpu_model() -> str:
    fields: dict[str, str] = {}
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            name, _, value = line.partition(":")
            fields[name.strip()] = value.strip()
    except OSError:
        return platform.processor()
    return f"{fields.get('model name', '')} family {fields.get('cpu family', '')} model {fields.get('model', '')}"


def record(benchmark: str, row: Mapping[str, Any], about: Mapping[str, Any]) -> None:
    """Append one JSON line to results/BENCHMARK.jsonl."""
    RESULTS.mkdir(exist_ok=True)
    with (RESULTS / f"{benchmark}.jsonl").open("a") as file:
        file.write(json.dumps({**row, **about}) + "\n")


def against_ours(times: Mapping[str, float]) -> list[list[str]]:
    """Rows of a table: name, milliseconds, and these over those of "ours"."""
    return [[name, f"{value:.2f} ms", f"{value / times['ours']:.2f}"] for name, value in times.items()]


def table(rows: list[list[str]]) -> str:
    """Columns aligned, the first to the left."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = []
    for row in rows:
        cells = [
            cell.ljust(w) if i == 0 else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=True))
        ]
        lines.append("  ".join(cells))
    return "\n".join(lines)
