"""The CUDA kernels against the float64 difference form. Needs a CUDA device and the CUDA library."""

import pytest
import torch
from torch import Tensor

from tests.kernels.cuda_data import CASES, TWO_PART_WEIGHTS, assert_nearest, make_case, random_case
from tokenizers_mm.kernels import _cuda, reference


def why_skip() -> str | None:
    if not torch.cuda.is_available():
        return "no CUDA device"
    return _cuda.why_unavailable(torch.device("cuda", torch.cuda.current_device()))


REASON = why_skip()
PASSES = ["exact", "portable"]
if REASON is None and torch.cuda.get_device_capability() == (9, 0):
    PASSES.append("hopper")
pytestmark = [pytest.mark.cuda, pytest.mark.skipif(REASON is not None, reason=str(REASON))]


@pytest.fixture(params=PASSES)
def cuda_pass(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("TOKENIZERS_MM_CUDA_PASS", request.param)
    return request.param


def random_pair(rows: int, codes: int, dim: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    generator = torch.Generator("cuda").manual_seed(rows + codes + dim)
    make = {"device": "cuda", "generator": generator}
    return torch.randn(rows, dim, **make).to(dtype), torch.randn(codes, dim, **make).to(dtype)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("rows", [1, 700])
def test_every_case(cuda_pass: str, name: str, rows: int) -> None:
    z, codebook = (tensor.cuda() for tensor in make_case(name, max(rows, 8)))
    z = z[:rows]
    ids, distances = _cuda.nearest_code(z, codebook)
    assert_nearest(ids, distances, (z,), (codebook,), (1.0,))


@pytest.mark.parametrize("dim", [1, 2, 7, 10, 11, 26, 27, 58, 59, 64, 130, 256, 800])
@pytest.mark.parametrize("codes", [1, 2, 63, 255, 257, 5000])
def test_every_edge(cuda_pass: str, codes: int, dim: int) -> None:
    for rows in (1, 127, 129):
        z, codebook = random_pair(rows, codes, dim)
        assert_nearest(*_cuda.nearest_code(z, codebook), (z,), (codebook,), (1.0,))


def test_random_cases(cuda_pass: str) -> None:
    for seed in range(200):
        z, codebook = (tensor.cuda() for tensor in random_case(seed))
        assert_nearest(*_cuda.nearest_code(z, codebook), (z,), (codebook,), (1.0,))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
def test_passes_agree_bit_for_bit(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    z, codebook = random_pair(40_000, 9000, 20, dtype)  # more than one chunk of rows
    answers = []
    for name in [*PASSES, *PASSES]:
        monkeypatch.setenv("TOKENIZERS_MM_CUDA_PASS", name)
        answers.append(_cuda.nearest_code(z, codebook))
    for ids, distances in answers[1:]:
        assert torch.equal(ids, answers[0][0])
        assert torch.equal(distances, answers[0][1])


def test_batch_split_does_not_matter(cuda_pass: str) -> None:
    z, codebook = random_pair(1000, 3000, 48)
    whole = _cuda.nearest_code(z, codebook)
    parts = [_cuda.nearest_code(part, codebook) for part in z.split(77)]
    assert torch.equal(whole[0], torch.cat([ids for ids, _ in parts]))
    assert torch.equal(whole[1], torch.cat([distances for _, distances in parts]))


@pytest.mark.parametrize("weights", TWO_PART_WEIGHTS)
def test_two_codebooks(cuda_pass: str, weights: tuple[float, float]) -> None:
    z1, c1 = random_pair(500, 2500, 100)
    z2, c2 = random_pair(500, 2500, 8, torch.bfloat16)
    ids, distances = _cuda.nearest_code_shared((z1, z2), (c1, c2), weights)
    assert_nearest(ids, distances, (z1, z2), (c1, c2), weights)


def test_wide_rows_take_the_exact_path() -> None:
    z, codebook = random_pair(5, 40, 17_000)
    assert_nearest(*_cuda.nearest_code(z, codebook), (z,), (codebook,), (1.0,))


def test_no_rows() -> None:
    z, codebook = random_pair(0, 40, 8)
    ids, distances = _cuda.nearest_code(z, codebook)
    assert ids.shape == distances.shape == (0,)
    assert ids.dtype == torch.int64


def test_runs_on_the_current_stream(cuda_pass: str) -> None:
    z, codebook = random_pair(3000, 4000, 32)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        late = torch.zeros_like(z)
        torch.cuda._sleep(20_000_000)
        late += z
        ids, distances = _cuda.nearest_code(late, codebook)
    stream.synchronize()
    assert_nearest(ids, distances, (z,), (codebook,), (1.0,))


def test_extra_memory_is_bounded(cuda_pass: str) -> None:
    z, codebook = random_pair(300_000, 4096, 16)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    outputs = _cuda.nearest_code(z, codebook)
    extra = torch.cuda.max_memory_allocated() - before - sum(out.numel() * 8 for out in outputs)
    assert extra < (32 << 20) + 4096 * 32 * 2


def test_wrong_pass_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    z, codebook = random_pair(4, 4, 4)
    monkeypatch.setenv("TOKENIZERS_MM_CUDA_PASS", "fastest")
    with pytest.raises(ValueError, match="expected one of auto, portable, hopper, exact, got fastest"):
        _cuda.nearest_code(z, codebook)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_code_sums(dtype: torch.dtype) -> None:
    vectors, _ = random_pair(5000, 1, 24, dtype)
    ids = torch.randint(0, 90, (5000,), generator=torch.Generator("cuda").manual_seed(0), device="cuda")
    counts, sums = _cuda.code_sums(vectors, ids, 100)
    expected_counts, expected_sums = reference.code_sums(vectors.cpu(), ids.cpu(), 100)
    assert torch.equal(counts.cpu(), expected_counts)
    torch.testing.assert_close(sums.cpu(), expected_sums, rtol=1e-13, atol=1e-13)
    assert torch.equal(sums, _cuda.code_sums(vectors, ids, 100)[1])
