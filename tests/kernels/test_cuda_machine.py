"""The CUDA source itself, kernels and all, run on the host over a model of the machine (cuda_machine_host.h).

The model follows the documented meaning of the shared-memory, copy, barrier and matrix instructions and does
asynchronous work as late as it may. What it cannot show: that the model is right, speed, and races within a warp.
"""

import ctypes
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.kernels.cuda_data import TWO_PART_WEIGHTS, assert_margins, assert_nearest, hidden_second_case, make_case
from tokenizers_mm import kernels
from tokenizers_mm.kernels import _cuda, _ops, reference
from tokenizers_mm.kernels._packed import joint_rows

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
        pointers = [tensor.data_ptr() for tensor in (workspace, ids, distances)]
        arguments = tokens, codes, scales, parts, packed.data_ptr(), 0, *pointers, None, None, choice, 0, None
        assert self.library.tmm_cuda_nearest(*arguments) == 0
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
    pointers = order.data_ptr(), begin.data_ptr(), 50, sums.data_ptr(), None
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
    pointers = packed.data_ptr(), z.data_ptr(), None, None, None
    assert nearest(tokens, codes, one, 1, packed.data_ptr(), 0, *pointers, 0, 0, None) != 0


@pytest.fixture
def host(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """`_cuda`, cache and all, over the model: CPU tensors stand for CUDA tensors."""
    monkeypatch.setattr(_cuda, "load_library", lambda: machine.library)
    monkeypatch.setattr(_ops, "_library", lambda device: None)
    monkeypatch.setattr(_ops, "_twin", lambda device: _cuda)
    _cuda.packs.clear()
    _cuda.faults().take_bad_ids()
    yield
    _cuda.packs.clear()


def random_pair(rows: int, num_codes: int, dim: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(rows + num_codes + dim)
    return torch.randn(rows, dim, generator=generator), torch.randn(num_codes, dim, generator=generator)


@pytest.mark.parametrize("pass_name", PASSES)
@pytest.mark.parametrize("name", ["gauss", "narrow", "duplicates", "far_clump", "not_finite", "mixed"])
def test_margins(host: None, name: str, pass_name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TOKENIZERS_MM_CUDA_PASS", pass_name)
    z, codebook = make_case(name, rows=8)
    codebook = codebook[:600]
    ids, distances, margins = _cuda.search((z,), (codebook,), (1.0,), margin=True)
    assert margins is not None
    assert_nearest(ids, distances, (z,), (codebook,), (1.0,))
    assert_margins(margins, ids, (z,), (codebook,), (1.0,))


@pytest.mark.parametrize("num_codes", [1, 2, 3])
def test_margins_of_few_codes(host: None, num_codes: int) -> None:
    z, codebook = random_pair(20, num_codes, 4)
    ids, distances, margins = _cuda.search((z,), (codebook,), (1.0,), margin=True)
    assert margins is not None
    assert_nearest(ids, distances, (z,), (codebook,), (1.0,))
    assert_margins(margins, ids, (z,), (codebook,), (1.0,))
    assert bool(torch.isinf(margins).all()) == (num_codes == 1)


def test_the_second_nearest_code_may_be_outside_the_records(host: None) -> None:
    z, codebook = hidden_second_case()
    ids, _, margins = _cuda.search((z,), (codebook,), (1.0,), margin=True)
    assert margins is not None
    assert torch.isfinite(margins).all()
    assert_margins(margins, ids, (z,), (codebook,), (1.0,))


def test_a_pack_is_kept_and_follows_the_version(host: None) -> None:
    z, codebook = random_pair(6, 300, 8)
    first, checked = _cuda.packs.get((codebook,), (1.0,))
    again, checked_again = _cuda.packs.get((codebook,), (1.0,))
    assert (checked, checked_again) == (False, True)
    assert again is first
    assert _cuda.packs.get((codebook,), (2.0,))[0] is not first
    codebook.copy_(codebook.flip(0))
    new, checked = _cuda.packs.get((codebook,), (1.0,))
    assert new is not first
    assert new.buffer is first.buffer  # on the same stream, and nobody will ask for the first again
    assert not checked
    assert_nearest(*_cuda.nearest_code(z, codebook), (z,), (codebook,), (1.0,))
    kernels.invalidate()
    assert len(_cuda.packs) == 0


@pytest.mark.parametrize("pass_name", PASSES)
def test_a_change_behind_torch_is_noticed(host: None, pass_name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TOKENIZERS_MM_CUDA_PASS", pass_name)
    z, codebook = random_pair(6, 300, 8)
    codebook[7, 3] = torch.nan
    _cuda.nearest_code(z, codebook)
    pack = _cuda.packs.get((codebook,), (1.0,))[0]
    version = codebook._version
    codebook.data[7, 3] = 0.5
    codebook.data[9, 0] = torch.inf
    codebook.data[20:] = z.repeat(47, 1)[:280] + 0.01 * codebook.data[20:]
    assert codebook._version == version
    assert not _cuda.faults().stale(pack.row)
    assert_nearest(*_cuda.nearest_code(z, codebook), (z,), (codebook,), (1.0,))
    assert _cuda.faults().stale(pack.row)
    for value in (1.0, 2.0):  # from now on it is packed at every call
        codebook.data[3] = value
        other, checked = _cuda.packs.get((codebook,), (1.0,))
        assert other is not pack
        assert not checked
        assert_nearest(*_cuda.nearest_code(z, codebook), (z,), (codebook,), (1.0,))


def test_packs_of_codebooks_that_are_gone_are_used_again(host: None) -> None:
    buffers = set()
    for seed in range(6):
        z, codebook = random_pair(2, 40, 3)
        assert_nearest(*_cuda.nearest_code(z, codebook + seed), (z,), (codebook + seed,), (1.0,))
        assert len(_cuda.packs) == 1
        buffers |= {entry.pack.buffer.data_ptr() for entry in _cuda.packs._entries.values()}
    assert len(buffers) == 1
    kept = [torch.randn(30 + i, 4) for i in range(_cuda.MAX_PACKS + 3)]
    for codebook in kept:
        _cuda.packs.get((codebook,), (1.0,))
    assert len(_cuda.packs) == _cuda.MAX_PACKS


def test_every_single_change_alters_the_hash(host: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TOKENIZERS_MM_CUDA_PASS", "exact")
    z, codebook = random_pair(1, 9, 3)
    pack, _ = _cuda.packs.get((codebook,), (1.0,))
    for place in range(codebook.numel()):
        kept = codebook.view(-1)[place].item()
        codebook.data.view(-1)[place] = torch.nextafter(torch.tensor(kept), torch.tensor(9.0))
        _cuda.nearest_code(z, codebook)
        assert _cuda.faults().stale(pack.row), place
        codebook.data.view(-1)[place] = kept
        _cuda.packs.clear()
        pack, _ = _cuda.packs.get((codebook,), (1.0,))


def test_a_trusted_version_is_not_checked(host: None) -> None:
    z, codebook = random_pair(6, 300, 8)
    before, _ = _cuda.nearest_code(z, codebook)
    pack = _cuda.packs.get((codebook,), (1.0,))[0]
    codebook.data.copy_(codebook.flip(0))
    _cuda.search((z,), (codebook,), (1.0,), trust_version=True)
    assert not _cuda.faults().stale(pack.row)
    assert torch.equal(_cuda.nearest_code(z, codebook)[0], 299 - before)
    assert _cuda.faults().stale(pack.row)


def test_ids_that_are_no_codes_are_reported_by_a_later_call(host: None) -> None:
    vectors = torch.randn(5, 3)
    counts, sums = kernels.code_sums(vectors, torch.tensor([0, 1, 4, -1, 1]), 2)
    assert counts.tolist() == [1, 2]
    torch.testing.assert_close(sums[1], (vectors[1] + vectors[4]).double())
    with pytest.raises(ValueError, match="ids: expected values in 0"):
        _cuda.raise_reported()
    _cuda.raise_reported()


@pytest.mark.parametrize("normalize", [False, True])
def test_shared_index_is_searched_directly(host: None, normalize: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_cuda, "NORMALIZED_ELEMENTS", 100)
    z1, c1 = random_pair(9, 300, 12)
    z2, c2 = random_pair(9, 300, 8)
    packed = []
    pack = _cuda._pack
    monkeypatch.setattr(_cuda, "_pack", lambda *arguments, **options: packed.append(1) or pack(*arguments, **options))
    weights = (1.0, 0.5)
    ids = kernels.nearest_code_shared((z1.view(3, 3, 12), z2.view(3, 3, 8)), (c1, c2), weights, normalize=normalize)
    assert len(packed) == 1
    parts = [joint_rows(pair, weights, normalize, torch.float64) for pair in ((z1, z2), (c1, c2))]
    assert torch.equal(ids.view(-1), reference.nearest_code(*parts)[0])


def test_no_rows(host: None) -> None:
    z, codebook = random_pair(0, 40, 8)
    assert kernels.nearest_code(z.view(0, 2, 8), codebook).shape == (0, 2)
    assert kernels.nearest_code_shared((z, z), (codebook, codebook), normalize=True).shape == (0,)


def test_few_rows_of_a_large_codebook_need_no_pack(host: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_cuda, "LARGE_CODEBOOK", 300 * 8)
    monkeypatch.setattr(_cuda, "_pack", lambda *arguments: pytest.fail("packed"))
    z, codebook = random_pair(_cuda.FEW_ROWS, 300, 8)
    ids, distances, margins = _cuda.search((z,), (codebook,), (1.0,), margin=True)
    assert margins is not None
    assert_nearest(ids, distances, (z,), (codebook,), (1.0,))
    assert_margins(margins, ids, (z,), (codebook,), (1.0,))


@pytest.mark.full
def test_more_listed_rows_than_are_shared_out(machine: Machine) -> None:
    """Sets of rows instead of parts of the codes: every row of the exact launch is listed."""
    z, codebook = random_pair(2049, 20, 2)
    ids, distances, listed = machine.nearest((z,), (codebook,), (1.0,), "exact")
    assert listed == 2049
    assert_nearest(ids, distances, (z,), (codebook,), (1.0,))
