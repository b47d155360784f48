"""The CUDA source itself, kernels and all, run on the host over a model of the machine (cuda_machine_host.h).

The model follows the documented meaning of the shared-memory, copy, barrier and matrix instructions and does
asynchronous work as late as it may. What it cannot show: that the model is right, speed, and races within a warp.
"""

import ctypes
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.kernels.cuda_data import TWO_PART_WEIGHTS, assert_nearest, make_case
from tokenizers_mm.kernels import _cuda, reference

ROOT = Path(__file__).resolve().parents[2]
PASSES = ["portable", "hopper", "exact"]


def aligned_bytes(size: int) -> Tensor:
    """Scratch memory as a caller might hand it over: aligned to 256 bytes, full of what was there before."""
    raw = torch.full((size + 256,), 0xAB, dtype=torch.uint8)
    start = -raw.data_ptr() % 256
    return raw[start : start + size]


class Machine:
    def __init__(self, library: ctypes.CDLL) -> None:
        self.library = library

    def nearest(
        self, zs: tuple[Tensor, ...], codebooks: tuple[Tensor, ...], weights: tuple[float, ...], pass_name: str
    ) -> tuple[Tensor, Tensor, int]:
        """Ids, distances, and how many rows of the last chunk went to the exact launch."""
        rows, num_codes = zs[0].shape[0], codebooks[0].shape[0]
        dim = sum(codebook.shape[1] for codebook in codebooks)
        ids, distances = torch.full((rows,), -7), torch.zeros(rows, dtype=torch.float64)
        packed = aligned_bytes(self.library.tmm_cuda_packed_bytes(num_codes, dim))
        workspace = aligned_bytes(self.library.tmm_cuda_workspace_bytes(rows, num_codes, dim))
        scales = (ctypes.c_double * len(weights))(*weights)
        tokens, codes = _cuda.matrices(zs), _cuda.matrices(codebooks)
        parts, choice = len(zs), _cuda.PASSES[pass_name]
        assert self.library.tmm_cuda_pack(codes, scales, parts, packed.data_ptr(), 0, None) == 0
        pointers = [tensor.data_ptr() for tensor in (packed, workspace, ids, distances)]
        assert self.library.tmm_cuda_nearest(tokens, codes, scales, parts, *pointers, choice, 0, None) == 0
        list_bytes = (-(-rows // 128) * 128 + 1) * 4  # the list ends the workspace
        listed = workspace[workspace.numel() - -(-list_bytes // 256) * 256 :][:4].view(torch.int32)
        return ids, distances, int(listed)


@pytest.fixture(scope="module")
def machine(tmp_path_factory: pytest.TempPathFactory) -> Machine:
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("no g++ on PATH")
    library = tmp_path_factory.mktemp("machine") / "machine.so"
    model = ROOT / "tests" / "kernels" / "cuda_machine_host.h"
    flags = ["-x", "c++", "-std=c++17", "-O2", "-Wall", "-Wno-unknown-pragmas", "-ffp-contract=off", "-fPIC", "-shared"]
    source = ROOT / "csrc" / "cuda_nearest.cu"
    define = f'-DTMM_MACHINE="{model}"'
    subprocess.run([compiler, *flags, define, str(source), "-o", str(library)], check=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TOKENIZERS_MM_CUDA_LIBRARY", str(library))
        return Machine(_cuda.load_library.__wrapped__())


@pytest.mark.parametrize("pass_name", PASSES)
@pytest.mark.parametrize(
    "name", ["gauss", "anisotropic", "narrow", "duplicates", "log_normal_norms", "offset", "not_finite", "mixed"]
)
def test_kernels_return_the_float64_answer(machine: Machine, name: str, pass_name: str) -> None:
    z, codebook = make_case(name, rows=20)
    ids, distances, listed = machine.nearest((z,), (codebook,), (1.0,), pass_name)
    assert_nearest(ids, distances, (z,), (codebook,), (1.0,))
    if pass_name != "exact" and name != "duplicates":
        assert listed <= 2


@pytest.mark.parametrize("pass_name", ["portable", "hopper"])
@pytest.mark.parametrize(
    ("rows", "num_codes", "dim"),
    [(1, 1, 1), (130, 300, 10), (3, 257, 26), (129, 600, 27), (5, 256, 58), (2, 700, 64), (140, 520, 130)],
)
def test_every_edge_of_the_tiles(machine: Machine, rows: int, num_codes: int, dim: int, pass_name: str) -> None:
    generator = torch.Generator().manual_seed(dim)
    z, codebook = torch.randn(rows, dim, generator=generator), torch.randn(num_codes, dim, generator=generator)
    ids, distances, listed = machine.nearest((z,), (codebook,), (1.0,), pass_name)
    assert_nearest(ids, distances, (z,), (codebook,), (1.0,))
    assert listed <= 1 + rows // 50


@pytest.mark.full
@pytest.mark.parametrize("pass_name", ["portable", "hopper"])
def test_segments_of_several_tiles(machine: Machine, pass_name: str) -> None:
    generator = torch.Generator().manual_seed(1)
    z, codebook = torch.randn(2, 4, generator=generator), torch.randn(17_000, 4, generator=generator)
    ids, distances, _ = machine.nearest((z,), (codebook,), (1.0,), pass_name)
    assert_nearest(ids, distances, (z,), (codebook,), (1.0,))


def test_rows_without_a_certificate_take_the_exact_launch(machine: Machine) -> None:
    z, codebook = make_case("identical", rows=9)
    ids, distances, listed = machine.nearest((z,), (codebook[:600],), (1.0,), "portable")
    assert_nearest(ids, distances, (z,), (codebook[:600],), (1.0,))
    assert listed == 9


@pytest.mark.parametrize("weights", TWO_PART_WEIGHTS)
def test_two_codebooks(machine: Machine, weights: tuple[float, float]) -> None:
    generator = torch.Generator().manual_seed(5)
    zs = (torch.randn(9, 24, generator=generator), torch.randn(9, 8, generator=generator).bfloat16())
    codebooks = (torch.randn(300, 24, generator=generator).half(), torch.randn(300, 8, generator=generator))
    ids, distances, _ = machine.nearest(zs, codebooks, weights, "hopper")
    assert_nearest(ids, distances, zs, codebooks, weights)


def test_code_sums(machine: Machine) -> None:
    vectors = torch.randn(300, 5, generator=torch.Generator().manual_seed(2))
    ids = torch.randint(0, 40, (300,), generator=torch.Generator().manual_seed(3))
    by_code, order = torch.sort(ids, stable=True)
    begin = torch.searchsorted(by_code, torch.arange(51))
    sums = torch.empty(50, 5, dtype=torch.float64)
    rows = ctypes.byref(_cuda.matrix(vectors))
    pointers = order.data_ptr(), begin.data_ptr(), 50, sums.data_ptr()
    assert machine.library.tmm_cuda_code_sums(rows, *pointers, 0, None) == 0
    counts, expected = reference.code_sums(vectors, ids, 50)
    assert torch.equal(begin.diff(), counts)
    torch.testing.assert_close(sums, expected, rtol=1e-14, atol=1e-14)


def test_bad_arguments_are_refused(machine: Machine) -> None:
    z, codebook = torch.randn(3, 4), torch.randn(5, 4)
    one = (ctypes.c_double * 1)(1.0)
    negative = (ctypes.c_double * 1)(-1.0)
    packed = aligned_bytes(machine.library.tmm_cuda_packed_bytes(5, 4))
    pack = machine.library.tmm_cuda_pack
    assert pack(_cuda.matrices((codebook,)), negative, 1, packed.data_ptr(), 0, None) != 0
    assert pack(_cuda.matrices((codebook,)), one, 3, packed.data_ptr(), 0, None) != 0
    assert pack(_cuda.matrices((codebook,)), one, 1, None, 0, None) != 0
    tokens, codes = _cuda.matrices((z,)), _cuda.matrices((torch.randn(5, 3),))
    nearest = machine.library.tmm_cuda_nearest
    assert nearest(tokens, codes, one, 1, packed.data_ptr(), packed.data_ptr(), z.data_ptr(), None, 0, 0, None) != 0
