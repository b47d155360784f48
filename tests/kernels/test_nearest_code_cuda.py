"""The CUDA kernels against the float64 difference form. Needs a CUDA device and the CUDA library."""

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
from tokenizers_mm import kernels
from tokenizers_mm.kernels import _cuda, reference
from tokenizers_mm.kernels._packed import joint_rows


def why_skip() -> str | None:
    if not torch.cuda.is_available():
        return "no CUDA device"
    return _cuda.why_unavailable(torch.device("cuda", torch.cuda.current_device()))


REASON = why_skip()
PASSES = ["exact", "portable"]
if REASON is None and torch.cuda.get_device_capability() == (9, 0):
    PASSES.append("hopper")
pytestmark = [pytest.mark.cuda, pytest.mark.skipif(REASON is not None, reason=str(REASON))]


@pytest.fixture(autouse=True)
def nothing_reported() -> None:
    _cuda.packs.clear()
    _cuda.faults().take_bad_ids()


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
    again, _, margins = _cuda.search((z,), (codebook,), (1.0,), margin=True)
    assert margins is not None
    assert torch.equal(again, ids)
    assert_margins(margins, ids, (z,), (codebook,), (1.0,))


def test_a_second_nearest_outside_the_records(cuda_pass: str) -> None:
    z, codebook = (tensor.cuda() for tensor in hidden_second_case())
    ids, _, margins = _cuda.search((z,), (codebook,), (1.0,), margin=True)
    assert margins is not None
    assert torch.isfinite(margins).all()
    assert_margins(margins, ids, (z,), (codebook,), (1.0,))


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
    ids, distances, margins = _cuda.search((z1, z2), (c1, c2), weights, margin=True)
    assert margins is not None
    assert_nearest(ids, distances, (z1, z2), (c1, c2), weights)
    assert_margins(margins, ids, (z1, z2), (c1, c2), weights)


def test_wide_rows_take_the_exact_path() -> None:
    z, codebook = random_pair(5, 40, 17_000)
    assert_nearest(*_cuda.nearest_code(z, codebook), (z,), (codebook,), (1.0,))


def test_no_rows() -> None:
    z, codebook = random_pair(0, 40, 8)
    ids, distances = _cuda.nearest_code(z, codebook)
    assert ids.shape == distances.shape == (0,)
    assert ids.dtype == torch.int64
    assert kernels.nearest_code(z.view(0, 3, 8), codebook).shape == (0, 3)
    assert kernels.nearest_code_shared((z, z), (codebook, codebook), normalize=True).shape == (0,)
    counts, sums = kernels.code_sums(z, ids, 40)
    assert not counts.any()
    assert not sums.any()


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


def layouts(tensor: Tensor) -> dict[str, Tensor]:
    """The same values under strides and addresses that no copy of whole lines allows."""
    rows, cols = tensor.shape
    shifted = tensor.new_zeros(rows * cols + 3)[3:].view(rows, cols)
    wide = tensor.new_zeros(rows, 2 * cols + 1)
    shifted.copy_(tensor)
    wide[:, 1::2] = tensor
    return {
        "transposed": tensor.T.contiguous().T,
        "off the line": shifted,
        "every second column": wide[:, 1::2],
    }


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
def test_layouts(cuda_pass: str, dtype: torch.dtype) -> None:
    z, codebook = random_pair(130, 515, 21, dtype)
    expected = _cuda.nearest_code(z, codebook)
    for name, rows in layouts(z).items():
        for codes in (codebook, *layouts(codebook).values()):
            ids, distances = _cuda.nearest_code(rows, codes)
            assert torch.equal(ids, expected[0]), name
            assert torch.equal(distances, expected[1]), name
    one = z[:1].expand(130, 21)
    assert_nearest(*_cuda.nearest_code(one, codebook), (one,), (codebook,), (1.0,))


def test_a_large_codebook(cuda_pass: str) -> None:
    z, codebook = random_pair(70, 262_144, 8)
    assert_nearest(*_cuda.nearest_code(z, codebook), (z,), (codebook,), (1.0,))


def test_answers_are_the_same_on_every_run(cuda_pass: str) -> None:
    z, codebook = (tensor.cuda() for tensor in make_case("duplicates", 3000))
    first = _cuda.search((z,), (codebook,), (1.0,), margin=True)
    for _ in range(20):
        for one, other in zip(first, _cuda.search((z,), (codebook,), (1.0,), margin=True), strict=True):
            assert one is not None
            assert other is not None
            assert torch.equal(one, other)


def test_public_functions_do_not_wait_for_the_device() -> None:
    z, codebook = random_pair(500, 300, 24)
    z.requires_grad_()
    codebook.requires_grad_()
    with kernels.use_kernels("native"):
        kernels.nearest_code(z, codebook)  # loads the library
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            for _ in range(2):
                ids, distance = kernels.nearest_code(z.view(5, 100, 24), codebook, return_distance=True)
                distance.sum().backward()
                kernels.code_sums(z, ids.view(-1), 300)
                kernels.nearest_code(z[:, ::2], codebook[:, ::2])
                kernels.nearest_code_shared(z.split(12, 1), codebook.split(12, 1), (1.0, 0.5))
                kernels.nearest_code_shared(z.split(12, 1), codebook.split(12, 1), normalize=True)
                kernels.nearest_code_shared(z.split(8, 1), codebook.split(8, 1), (1.0, 0.5, 2.0))
        finally:
            torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("normalize", [False, True])
def test_shared_index(normalize: bool) -> None:
    z1, c1 = random_pair(300, 900, 40)
    z2, c2 = random_pair(300, 900, 8)
    weights = (1.0, 0.25)
    ids = kernels.nearest_code_shared((z1, z2), (c1, c2), weights, normalize=normalize)
    parts = [joint_rows(pair, weights, normalize, torch.float64) for pair in ((z1, z2), (c1, c2))]
    assert torch.equal(ids, reference.nearest_code(*parts)[0])


def test_gradients_are_those_of_the_reference() -> None:
    z, codebook = random_pair(400, 60, 12)
    gradients = []
    for mode in ("native", "reference"):
        leaves = [tensor.clone().requires_grad_() for tensor in (z, codebook)]
        with kernels.use_kernels(mode):
            _, distance = kernels.nearest_code(*leaves, return_distance=True)
        distance.square().sum().backward()
        gradients.append([leaf.grad for leaf in leaves])
    torch.testing.assert_close(*gradients, rtol=1e-5, atol=1e-5)


def test_a_pack_made_on_one_stream_serves_another() -> None:
    z, codebook = random_pair(3000, 4000, 32)
    torch.cuda.synchronize()
    maker, user = torch.cuda.Stream(), torch.cuda.Stream()
    with torch.cuda.stream(maker):
        torch.cuda._sleep(20_000_000)
        _cuda.nearest_code(z, codebook)
    with torch.cuda.stream(user):
        ids, distances = _cuda.nearest_code(z, codebook)
    torch.cuda.synchronize()
    assert len(_cuda.packs) == 1
    assert_nearest(ids, distances, (z,), (codebook,), (1.0,))


def test_a_graph_follows_the_codebook(cuda_pass: str) -> None:
    z, codebook = random_pair(1000, 700, 16)
    kernels.nearest_code(z, codebook)  # loads the library and the kernels
    _cuda.code_sums(z, torch.zeros(1000, dtype=torch.int64, device="cuda"), 700)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        ids, distances = _cuda.nearest_code(z, codebook)
        counts, _ = _cuda.code_sums(z, ids, 700)
    for _ in range(3):
        z.normal_()
        codebook.normal_()
        graph.replay()
        assert_nearest(ids, distances, (z,), (codebook,), (1.0,))
        assert torch.equal(counts, torch.bincount(ids, minlength=700))


def test_compiled_with_graphs() -> None:
    pytest.importorskip("triton", reason="torch.compile on CUDA needs triton")
    z, codebook = random_pair(256, 100, 16)

    @torch.compile(mode="reduce-overhead", fullgraph=True)
    def look_up(z: Tensor, codebook: Tensor) -> Tensor:
        return codebook[kernels.nearest_code(z * 2, codebook)]

    with torch.no_grad():
        for _ in range(5):
            codebook.normal_()
            found = look_up(z, codebook).clone()
            assert torch.equal(found, codebook[_cuda.nearest_code(z * 2, codebook)[0]])


def test_a_change_behind_torch_is_noticed(cuda_pass: str) -> None:
    z, codebook = random_pair(400, 900, 8)
    _cuda.nearest_code(z, codebook)
    row = _cuda.packs.get((codebook,), (1.0,))[0].row
    codebook.data.copy_(codebook.flip(0) + 0.25)
    assert_nearest(*_cuda.nearest_code(z, codebook), (z,), (codebook,), (1.0,))
    torch.cuda.synchronize()
    assert _cuda.faults().stale(row)
    codebook.data.mul_(0.5)
    assert not _cuda.packs.get((codebook,), (1.0,))[1]
    assert_nearest(*_cuda.nearest_code(z, codebook), (z,), (codebook,), (1.0,))


def test_ids_that_are_no_codes_are_reported_by_a_later_call() -> None:
    vectors, codebook = random_pair(5, 2, 3)
    counts, _ = kernels.code_sums(vectors, torch.tensor([0, 1, 4, -1, 1], device="cuda"), 2)
    assert counts.tolist() == [1, 2]
    torch.cuda.synchronize()
    with pytest.raises(ValueError, match="ids: expected values in 0"):
        kernels.nearest_code(vectors, codebook)
    kernels.nearest_code(vectors, codebook)


def test_another_device() -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("one CUDA device")
    z, codebook = (tensor.to("cuda:1") for tensor in random_pair(300, 500, 16))
    assert torch.cuda.current_device() == 0
    ids, distances = _cuda.nearest_code(z, codebook)
    assert ids.device == torch.device("cuda:1")
    assert torch.cuda.current_device() == 0
    assert_nearest(ids, distances, (z,), (codebook,), (1.0,))
