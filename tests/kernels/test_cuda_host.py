"""The mathematics of the CUDA search, run on the host through the header that the device code shares."""

import ctypes
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.kernels.cuda_data import (
    CASES,
    TWO_PART_WEIGHTS,
    assert_margins,
    assert_nearest,
    hidden_second_case,
    make_case,
    random_case,
)
from tokenizers_mm.kernels import _cuda

ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Run:
    ids: Tensor
    distances: Tensor
    margins: Tensor
    certified: int
    listed: int
    groups: int
    excess: int


class Emulation:
    def __init__(self, path: Path) -> None:
        self.library = ctypes.CDLL(str(path))
        self.library.emulate_half_value.restype = ctypes.c_double

    def nearest(
        self, zs: tuple[Tensor, ...], codebooks: tuple[Tensor, ...], weights: tuple[float, ...], margin: bool = False
    ) -> Run:
        rows = zs[0].shape[0]
        ids, distances = torch.empty(rows, dtype=torch.int64), torch.empty(rows, dtype=torch.float64)
        margins = torch.empty_like(distances)
        statistics = (ctypes.c_int64 * 4)()
        code = self.library.emulate_nearest(
            _cuda.matrices(zs),
            _cuda.matrices(codebooks),
            (ctypes.c_double * len(weights))(*weights),
            len(zs),
            ctypes.c_void_p(ids.data_ptr()),
            ctypes.c_void_p(distances.data_ptr()),
            ctypes.c_void_p(margins.data_ptr() if margin else None),
            1,
            statistics,
        )
        assert code == 0
        return Run(ids, distances, margins, *statistics)

    def plan(self, rows: int, codes: int, dim: int) -> list[int]:
        out = (ctypes.c_int64 * 8)()
        self.library.emulate_plan(*map(ctypes.c_int64, (rows, codes, dim)), out)
        return list(out)


@pytest.fixture(scope="module")
def emulation(tmp_path_factory: pytest.TempPathFactory) -> Emulation:
    compiler = shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        pytest.skip("no C++ compiler on PATH")
    library = tmp_path_factory.mktemp("emulation") / "emulation.so"
    source = ROOT / "tests" / "kernels" / "cuda_emulation.cpp"
    flags = ["-std=c++17", "-O2", "-Wall", "-Wextra", "-Werror", "-ffp-contract=off", "-fPIC", "-shared"]
    subprocess.run([compiler, *flags, f"-I{ROOT / 'csrc'}", str(source), "-o", str(library)], check=True)
    return Emulation(library)


@pytest.mark.parametrize("name", CASES)
def test_emulation_returns_the_float64_answer(emulation: Emulation, name: str) -> None:
    z, codebook = make_case(name, rows=96)
    run = emulation.nearest((z,), (codebook,), (1.0,))
    assert run.excess == 0, f"{run.excess} scores broke their bound"
    assert_nearest(run.ids, run.distances, (z,), (codebook,), (1.0,))


@pytest.mark.parametrize("name", CASES)
def test_emulation_returns_the_margin(emulation: Emulation, name: str) -> None:
    z, codebook = make_case(name, rows=32)
    run = emulation.nearest((z,), (codebook,), (1.0,), margin=True)
    assert_nearest(run.ids, run.distances, (z,), (codebook,), (1.0,))
    assert_margins(run.margins, run.ids, (z,), (codebook,), (1.0,))


def test_emulation_finds_a_second_nearest_outside_the_records(emulation: Emulation) -> None:
    z, codebook = hidden_second_case()
    run = emulation.nearest((z,), (codebook,), (1.0,), margin=True)
    assert torch.isfinite(run.margins).all()
    assert_margins(run.margins, run.ids, (z,), (codebook,), (1.0,))


@pytest.mark.parametrize("weights", TWO_PART_WEIGHTS)
def test_emulation_of_two_codebooks(emulation: Emulation, weights: tuple[float, float]) -> None:
    generator = torch.Generator().manual_seed(5)
    zs = (torch.randn(64, 24, generator=generator), torch.randn(64, 8, generator=generator).bfloat16())
    codebooks = (torch.randn(900, 24, generator=generator).half(), torch.randn(900, 8, generator=generator))
    run = emulation.nearest(zs, codebooks, weights, margin=True)
    assert run.excess == 0
    assert_nearest(run.ids, run.distances, zs, codebooks, weights)
    assert_margins(run.margins, run.ids, zs, codebooks, weights)


@pytest.mark.parametrize("dim", [1, 2, 3, 7, 10, 11, 26, 27, 64, 130])
@pytest.mark.parametrize("num_codes", [1, 2, 15, 255, 257])
def test_emulation_of_every_edge(emulation: Emulation, dim: int, num_codes: int) -> None:
    generator = torch.Generator().manual_seed(dim * 1000 + num_codes)
    z, codebook = torch.randn(9, dim, generator=generator), torch.randn(num_codes, dim, generator=generator)
    run = emulation.nearest((z,), (codebook,), (1.0,))
    assert run.excess == 0
    assert_nearest(run.ids, run.distances, (z,), (codebook,), (1.0,))


def test_emulation_of_random_cases(emulation: Emulation) -> None:
    for seed in range(150):
        z, codebook = random_case(seed)
        run = emulation.nearest((z,), (codebook,), (1.0,), margin=True)
        assert run.excess == 0, f"seed {seed}"
        assert_nearest(run.ids, run.distances, (z,), (codebook,), (1.0,))
        assert_margins(run.margins, run.ids, (z,), (codebook,), (1.0,))


def test_most_rows_are_certified(emulation: Emulation) -> None:
    """The bound is tight enough to be worth having: on ordinary data few groups are scored and few rows listed."""
    z, codebook = make_case("gauss", rows=256)
    run = emulation.nearest((z,), (codebook,), (1.0,))
    assert run.certified >= 0.98 * 256
    assert run.groups <= 1.2 * 256


def test_half_is_numpy_half(emulation: Emulation) -> None:
    library = emulation.library
    values = np.concatenate([np.random.default_rng(0).normal(size=4000) * 10.0 ** np.arange(-9, 5, 0.0035), [0.0]])
    values = values[np.abs(values) < 65504]
    for value in values.astype(np.float32):
        nearest = library.emulate_half(ctypes.c_double(float(value)), 0)
        assert nearest == int(np.float16(value).view(np.uint16))
        assert library.emulate_half_value(nearest) == float(np.float16(value))
        up = library.emulate_half(ctypes.c_double(abs(float(value))), 1)
        above = library.emulate_half_value(up)
        assert above >= abs(float(value))
        assert up == 0 or library.emulate_half_value(up - 1) < abs(float(value))


def test_a_lane_holds_consecutive_codes(emulation: Emulation) -> None:
    columns = [emulation.library.emulate_span_column(code) for code in range(64)]
    assert sorted(columns) == list(range(64))
    for code, column in enumerate(columns):
        assert column % 8 // 2 == code // 16  # the lane of the quad that owns the column


def test_root_exponent(emulation: Emulation) -> None:
    for value in (5e-324, 1e-300, 0.06, 0.25, 0.9, 1.0, 3.9, 4.0, 15.9, 16.0, 1e300):
        power = emulation.library.emulate_root_exponent(ctypes.c_double(value))
        assert 4.0**power <= value if power > -530 else True
        assert value / 4.0**power < 4.0 if power > -500 else True


@pytest.mark.parametrize(
    ("rows", "codes", "dim"), [(1, 1, 1), (16384, 8192, 32), (65536, 16384, 8), (10**7, 262144, 256)]
)
def test_plan_covers_the_codes_in_bounded_memory(emulation: Emulation, rows: int, codes: int, dim: int) -> None:
    width, padded, tiles, segments, segment_tiles, chunk_rows, packed, workspace = emulation.plan(rows, codes, dim)
    assert width % 16 == 0
    assert dim + 6 <= width < dim + 22
    assert padded == tiles * 256
    assert codes <= padded < codes + 256
    assert (segments - 1) * segment_tiles < tiles <= segments * segment_tiles
    assert chunk_rows % 128 == 0
    assert workspace < 32 << 20
    assert packed < padded * (width * 2 + 8) + 300 * dim * 8 + 4096


def test_a_missing_library_is_explained(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("TOKENIZERS_MM_CUDA_LIBRARY", str(tmp_path / "none.so"))
    with pytest.raises(_cuda.UnavailableError, match=r"none\.so does not load"):
        _cuda.load_library.__wrapped__()
    monkeypatch.delenv("TOKENIZERS_MM_CUDA_LIBRARY")
    monkeypatch.setattr(_cuda, "NAME", "libabsent.so")
    with pytest.raises(_cuda.UnavailableError, match=r"libabsent\.so was not built: install again with nvcc"):
        _cuda.load_library.__wrapped__()
