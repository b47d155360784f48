"""The CPU library under gcc's sanitizers, raced against itself with injected delays, and forked while it packs."""

import os
import platform
import shutil
import subprocess
import threading
import time
from pathlib import Path

import pytest
import torch

from tokenizers_mm import kernels
from tokenizers_mm.kernels import _native, _ops

ROOT = Path(__file__).resolve().parents[2]
COMPILER = shutil.which("g++") or shutil.which("clang++")
X86_FLAGS = {
    "avx512": "-mavx512f -mavx512bw -mavx512vl -mavx512dq -mavx512vnni -mfma",
    "avx_vnni": "-mavx2 -mfma -mavxvnni",
    "avx2": "-mavx2 -mfma",
}
ARM_FLAGS = {"neon_dot": "-march=armv8.2-a+dotprod", "neon_i8mm": "-march=armv8.2-a+dotprod+i8mm"}
FLAGS = {"x86_64": X86_FLAGS, "AMD64": X86_FLAGS, "aarch64": ARM_FLAGS, "arm64": ARM_FLAGS}


def build(folder: Path, sanitizer: str) -> Path:
    """The driver and the library, each file with its instruction set; skipped where the sanitizer is missing."""
    assert COMPILER is not None
    common = [COMPILER, "-std=c++17", "-O1", "-g", "-ffp-contract=off", f"-fsanitize={sanitizer}", "-DTMM_DELAY_HOOK"]
    common += ["-fno-sanitize-recover=all"] if "undefined" in sanitizer else []
    probe = folder / "probe.cpp"
    probe.write_text("int main() { return 0; }\n")
    if subprocess.run([*common, str(probe), "-o", str(folder / "probe")], capture_output=True, check=False).returncode:
        pytest.skip(f"this compiler has no -fsanitize={sanitizer}")
    known = FLAGS.get(platform.machine(), {})
    objects, running = [], []
    for source in [*sorted((ROOT / "csrc").glob("*.cpp")), Path(__file__).with_name("races.cpp")]:
        flags = next((value.split() for name, value in known.items() if name in source.name), [])
        objects.append(str(folder / f"{source.stem}.o"))
        running.append(
            subprocess.Popen([*common, *flags, "-I", str(ROOT / "csrc"), "-c", str(source), "-o", objects[-1]])
        )
        if len(running) == 2:
            assert running.pop(0).wait() == 0
    assert all(process.wait() == 0 for process in running)
    program = folder / "races"
    subprocess.run([*common, *objects, "-pthread", "-o", str(program)], check=True)
    return program


@pytest.mark.skipif(COMPILER is None, reason="no C++ compiler")
@pytest.mark.parametrize("sanitizer", ["thread", "address,undefined"])
def test_races(sanitizer: str, tmp_path: Path) -> None:
    command = [str(build(tmp_path, sanitizer)), "1"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if "unexpected memory mapping" in done.stderr and (setarch := shutil.which("setarch")):
        done = subprocess.run([setarch, "-R", *command], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[:4000]
    assert done.stdout == "ok\n"
    assert done.stderr == ""


@pytest.mark.skipif(_native.cpu_or_none() is None, reason="the native library is not installed")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # fork in a process with threads: the case under test
def test_fork_while_the_parent_packs() -> None:
    """Children are forked at any moment of packing, of searching and of keeping packs; each of them must answer."""
    z, big, small = torch.randn(64, 64), torch.randn(30000, 64), torch.randn(600, 64)
    expected = kernels.nearest_code(z, small)
    expected_big = kernels.nearest_code(z, big)
    stop = threading.Event()

    def pack() -> None:
        while not stop.is_set():
            kernels.invalidate()
            kernels.nearest_code(z, big)

    packers = [threading.Thread(target=pack) for _ in range(3)]
    for packer in packers:
        packer.start()
    try:
        children = []
        for _ in range(15):
            time.sleep(0.01)
            child = os.fork()
            if child == 0:
                torch.set_num_threads(1)
                right = torch.equal(kernels.nearest_code(z, big), expected_big)
                right &= torch.equal(kernels.nearest_code(z, small), expected)
                os._exit(0 if right else 1)
            children.append(child)
        with _ops.cache._lock:  # held by this thread, which the child has; the lock itself must be a new one there
            child = os.fork()
            if child == 0:
                os._exit(0 if torch.equal(kernels.nearest_code(z, small), expected) else 1)
            children.append(child)
        deadline = time.monotonic() + 60
        ended: dict[int, int] = {}
        while len(ended) < len(children) and time.monotonic() < deadline:
            for child in set(children) - set(ended):
                found, status = os.waitpid(child, os.WNOHANG)
                if found:
                    ended[child] = os.waitstatus_to_exitcode(status)
            time.sleep(0.01)
        for child in set(children) - set(ended):
            os.kill(child, 9)
            os.waitpid(child, 0)
        assert [ended.get(child) for child in children] == [0] * len(children)
    finally:
        stop.set()
        for packer in packers:
            packer.join()
