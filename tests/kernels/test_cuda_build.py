"""Compiles the CUDA kernels where nvcc is, and reads back the instructions that were meant."""

import importlib.util
import re
import shutil
import subprocess
from collections import Counter
from pathlib import Path

import pytest

SOURCE = Path(__file__).resolve().parents[2] / "csrc" / "cuda_nearest.cu"
NVCC = shutil.which("nvcc") or shutil.which("nvcc", path="/usr/local/cuda/bin")
pytestmark = pytest.mark.skipif(NVCC is None, reason="nvcc is not installed")


def compile_for(architecture: str, folder: Path) -> tuple[Path, str]:
    """The cubin and what the assembler reports."""
    cubin = folder / f"{architecture}.cubin"
    target = f"arch=compute_{architecture},code=sm_{architecture}"
    command = [NVCC, "-std=c++17", "-O3", "-gencode", target, "-Xptxas", "-v", "-cubin", "-o", str(cubin), str(SOURCE)]
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return cubin, done.stdout + done.stderr


def find_disassembler() -> str | None:
    """cuobjdump of the toolkit, or the one that comes with triton."""
    triton = importlib.util.find_spec("triton")
    roots = triton.submodule_search_locations or [] if triton else []
    folders = [None, "/usr/local/cuda/bin", *(f"{root}/backends/nvidia/bin" for root in roots)]
    return next(filter(None, (shutil.which("cuobjdump", path=folder) for folder in folders)), None)


def instructions(cubin: Path, kernel: str) -> Counter[str]:
    """Number of times each instruction occurs in the kernels whose mangled name contains `kernel`."""
    tool = find_disassembler()
    if tool is None:
        pytest.skip("cuobjdump is not installed")
    text = subprocess.run([tool, "-sass", str(cubin)], capture_output=True, text=True, check=True).stdout
    functions = text.split("Function : ")[1:]
    bodies = [body for body in functions if kernel in body.partition("\n")[0]]
    assert bodies, f"no kernel {kernel}"
    found = [re.findall(r"^\s+/\*\w+\*/\s+(?:@!?U?P\w+\s+)?([A-Z0-9]+)", body, re.MULTILINE) for body in bodies]
    return Counter(name for names in found for name in names)


def spills(report: str, kernel: str) -> list[int]:
    """Bytes spilled by each kernel whose mangled name contains `kernel`."""
    pattern = rf"Function properties for \S*{kernel}\S*\n\s+\d+ bytes stack frame, (\d+) bytes spill stores"
    return [int(size) for size in re.findall(pattern, report)]


@pytest.mark.parametrize("architecture", ["80", "90a"])
def test_portable_pass_uses_the_tensor_cores(architecture: str, tmp_path: Path) -> None:
    cubin, report = compile_for(architecture, tmp_path)
    assert spills(report, "8portable11search_pass") == [0]
    counts = instructions(cubin, "8portable11search_pass")
    assert counts["HMMA"] >= 64
    assert counts["LDSM"] > 0
    assert counts["LDGSTS"] > 0
    assert counts["LDL"] == counts["STL"] == 0


def test_hopper_pass_uses_wgmma_and_the_copy_engine(tmp_path: Path) -> None:
    cubin, report = compile_for("90a", tmp_path)
    assert spills(report, "6hopper11search_pass") == [0] * 4
    assert "C7508" not in report, "setmaxnreg is ignored"
    assert "C7510" not in report, "wgmma is serialised"
    assert "C7511" not in report, "wgmma is serialised"
    counts = instructions(cubin, "6hopper11search_pass")
    assert counts["HGMMA"] > 0
    assert counts["UTMALDG"] > 0
    assert counts["VIMNMX3"] > 0
    assert counts["USETMAXREG"] == 8
    assert counts["LDL"] == counts["STL"] == 0
