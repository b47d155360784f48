"""The ARM64 paths: cross-compiled, run under QEMU, and equal in every bit to the library of this machine."""

import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.kernels.test_integer_rungs import edge
from tests.kernels.test_margins import check
from tests.kernels.test_nearest_code import AWKWARD, awkward, gauss
from tokenizers_mm import kernels
from tokenizers_mm.functional.similarity import gaussian_line, uniform_line
from tokenizers_mm.kernels import _native, _ops
from tokenizers_mm.kernels._packed import PackedCodebook

ROOT = Path(__file__).resolve().parents[2]
COMPILER = shutil.which("aarch64-linux-gnu-g++")
QEMU = shutil.which("qemu-aarch64") or shutil.which("qemu-aarch64-static")
CPUS = {"cortex-a57": "neon", "neoverse-n1": "neon_dot", "max": "neon_i8mm"}
INTEGER = {"neon": ["int16"], "neon_dot": ["int8", "int16"], "neon_i8mm": ["int8", "int16"], "portable": []}
LIVE = -1

needs_native = pytest.mark.skipif(_native.cpu_or_none() is None, reason="the native library is not installed")
pytestmark = [
    pytest.mark.skipif(COMPILER is None, reason="aarch64-linux-gnu-g++ is not installed (g++-aarch64-linux-gnu)"),
    pytest.mark.skipif(shutil.which("cmake") is None or shutil.which("ninja") is None, reason="no cmake or no ninja"),
]
needs_qemu = pytest.mark.skipif(QEMU is None, reason="qemu-aarch64 is not installed (qemu-user)")


@pytest.fixture(scope="module")
def build(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the ARM64 library, as the wheel's CMake builds it, and of the programs that call it."""
    folder = tmp_path_factory.mktemp("arm64")
    toolchain = folder / "toolchain.cmake"
    toolchain.write_text(
        f"set(CMAKE_SYSTEM_NAME Linux)\nset(CMAKE_SYSTEM_PROCESSOR aarch64)\nset(CMAKE_CXX_COMPILER {COMPILER})\n"
    )
    environment = {**os.environ, "TOKENIZERS_MM_BUILD_CUDA": "0"}
    configure = ["cmake", "-S", str(ROOT), "-B", str(folder), "-G", "Ninja", f"-DCMAKE_TOOLCHAIN_FILE={toolchain}"]
    for command in (configure, ["cmake", "--build", str(folder)]):
        done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
        assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    for name in ("search_cases", "ssim_case", "races"):
        source, library = Path(__file__).with_name(f"{name}.cpp"), folder / "libtokenizers_mm.so"
        options = ["-std=c++17", "-O1", "-I", str(ROOT / "csrc"), f"-Wl,-rpath,{folder}", "-pthread"]
        command = [str(COMPILER), *options, str(source), str(library), "-o", str(folder / name)]
        subprocess.run(command, check=True)
    return folder


def run(build: Path, program: str, *arguments: str, cpu: str = "max") -> str:
    command = [str(QEMU), "-cpu", cpu, "-L", "/usr/aarch64-linux-gnu", str(build / program), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{done.returncode}: {done.stderr[-2000:]}"
    return done.stdout.strip()


def methods(z: Tensor, isa: str) -> list[int]:
    """Every way of searching these rows that the instruction set has."""
    names = ["auto", *INTEGER[isa], "float32", "brute"]
    if z.dtype == torch.float32:
        names += ["difference"] + (["tree"] if z.shape[1] <= 12 else [])
    return [_native.METHODS.index(name) for name in names] + [LIVE]


def searches(z: Tensor, isa: str) -> list[tuple[int, int, int]]:
    """Method, threads, margins: each method with margins, half of them without and on several threads."""
    found = methods(z, isa)
    return [(method, 1, 1) for method in found] + [(method, 3, 0) for method in found[len(z) % 2 :: 2]]


def cases() -> Iterator[tuple[str, Tensor, Tensor]]:
    """Name, tokens [N, D] and codes [K, D]."""
    for n, k, d in [
        (1, 1, 1),
        (5, 17, 3),
        (13, 64, 4),
        (61, 65, 7),
        (7, 300, 12),
        (19, 129, 33),
        (40, 333, 70),
        (12, 90, 257),
    ]:
        yield f"{n}x{k}x{d}", *gauss(n, k, d, n)
    for index, name in enumerate(AWKWARD):
        yield name, *awkward(name, n=20, k=200, d=(11, 24)[index % 2])
    for kind in ("flat", "signs", "runs", "one dimension", "wide", "split"):
        for d in (31, 530):
            yield kind, *edge(kind, 13, 70, d)
    for d in (2, 8):  # trees of several super boxes, repetitions and ties
        z, c = gauss(20, 3000, d, d)
        c[1500:] = c[:1500]
        yield "tree", z, c
        yield "lattice", (z * 3).round(), (c * 3).round()
    z, c = gauss(24, 150, 19)
    yield "float64", z.double(), c.double() + 1e-9 * gauss(150, 1, 19, 5)[0].double()
    z[3], z[5, 7] = torch.nan, torch.inf
    yield "not finite", z, c


def write_case(file, z: Tensor, c: Tensor, searches: list[tuple[int, int, int]]) -> None:
    head = [len(c), c.shape[1], int(c.dtype == torch.float64), len(z), len(searches)]
    for part in (np.array(head), c.numpy(), z.numpy(), np.array(searches)):
        file.write(np.ascontiguousarray(part).tobytes())


def here(z: Tensor, c: Tensor) -> tuple[int, Tensor, Tensor, Tensor]:
    """Status, ids, distances and margins of this machine's library."""
    answer = _ops._empty(z.shape[:1], z.dtype, "dm")
    packed = PackedCodebook(_native.cpu(), c, False, _native.METHODS.index("brute"))
    status = packed.search(c, z, answer, 1)
    assert answer.distance is not None
    assert answer.margin is not None
    return status, answer.ids, answer.distance.double(), answer.margin.double()


@needs_qemu
@pytest.mark.parametrize("cpu", CPUS)
def test_a_cpu_gets_the_strongest_set_it_has(cpu: str, build: Path, tmp_path: Path) -> None:
    (tmp_path / "none").touch()
    assert run(build, "search_cases", "best", str(tmp_path / "none"), str(tmp_path / "out"), cpu=cpu) == CPUS[cpu]


@needs_native
@needs_qemu
@pytest.mark.parametrize("isa", INTEGER)
def test_same_bits_as_this_machine(isa: str, build: Path, tmp_path: Path) -> None:
    """Each method, 1 and 3 threads, with and without margins: ids, distances and margins in every bit."""
    listed = [(name, z, c, searches(z, isa)) for name, z, c in list(cases())[:: 3 if isa == "portable" else 1]]
    with open(tmp_path / "cases", "wb") as file:
        for _, z, c, wanted in listed:
            write_case(file, z, c, wanted)
    assert run(build, "search_cases", isa, str(tmp_path / "cases"), str(tmp_path / "answers")) == isa
    answers, used = np.fromfile(tmp_path / "answers", np.int64), set()
    for name, z, c, wanted in listed:
        expected = here(z, c)
        for method, threads, margins in wanted:
            where = f"{name} {tuple(c.shape)} {method} {threads}"
            status, found = answers[:2].tolist()
            ids, distance, margin = (
                torch.from_numpy(part.copy()) for part in answers[2 : 2 + 3 * len(z)].reshape(3, -1)
            )
            answers = answers[2 + 3 * len(z) :]
            used.add(found)
            assert status == expected[0], where
            assert torch.equal(ids, expected[1]), where
            torch.testing.assert_close(distance.view(torch.double), expected[2], rtol=0, atol=0, equal_nan=True)
            if margins:
                torch.testing.assert_close(margin.view(torch.double), expected[3], rtol=0, atol=0, equal_nan=True)
        if name != "not finite":
            check(z, c, expected[1], expected[3].to(z.dtype))
    assert len(answers) == 0
    assert used == {*methods(torch.zeros(1, 1), isa), LIVE} - {_native.METHODS.index("auto")}


@needs_native
@needs_qemu
@pytest.mark.parametrize("isa", INTEGER)
@pytest.mark.parametrize("line", [gaussian_line(), uniform_line(7)], ids=["gaussian", "uniform"])
def test_ssim_has_the_same_bits_as_on_this_machine(line: Tensor, isa: str, build: Path, tmp_path: Path) -> None:
    x, y = torch.rand(2, 2, 75, 139, generator=torch.Generator().manual_seed(0))
    y = x + 0.1 * y
    head = np.array([*x.shape, len(line)], dtype=np.int64)
    (tmp_path / "case").write_bytes(b"".join(part.tobytes() for part in (head, line.numpy(), x.numpy(), y.numpy())))
    assert run(build, "ssim_case", isa, str(tmp_path / "case"), str(tmp_path / "answer")) == isa
    found = torch.from_numpy(np.fromfile(tmp_path / "answer")).view(2, 2, 2)
    expected = torch.stack(kernels.ssim(x, y, line, 1e-4, 9e-4, 0.5))
    assert torch.equal(found, expected.expand(2, 2, 2))


@needs_qemu
def test_threads_packs_digests_and_sums(build: Path) -> None:
    """The races of test_sanitizers.py, by emulation and without a sanitizer, on every instruction set."""
    assert run(build, "races", "1") == "ok"


def test_the_library_is_complete(build: Path) -> None:
    """The compiler knows sdot and smmla, and their files hold them."""
    listing = subprocess.run(
        ["aarch64-linux-gnu-objdump", "-d", str(build / "libtokenizers_mm.so")],
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    assert "\tsdot\t" in listing
    assert "\tsmmla\t" in listing
