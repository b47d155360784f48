"""code_sums against index_add in float64, and its determinism."""

import pytest
import torch

from tokenizers_mm import kernels
from tokenizers_mm.kernels import _native

MODES = [
    "reference",
    pytest.param(
        "native", marks=pytest.mark.skipif(_native.cpu_or_none() is None, reason="the native library is not installed")
    ),
]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize(("n", "k", "d"), [(0, 3, 4), (1, 1, 1), (500, 7, 5), (3000, 800, 33), (40, 900, 16)])
def test_counts_and_sums(n: int, k: int, d: int, dtype: torch.dtype, mode: str) -> None:
    g = torch.Generator().manual_seed(n + k)
    vectors = torch.randn(n, d, generator=g).to(dtype)
    ids = torch.randint(0, k, (n,), generator=g)
    with kernels.use_kernels(mode):
        counts, sums = kernels.code_sums(vectors, ids, k)
    assert counts.dtype == torch.int64
    assert sums.dtype == torch.float64
    assert torch.equal(counts, torch.bincount(ids, minlength=k))
    expected = torch.zeros(k, d, dtype=torch.float64).index_add_(0, ids, vectors.double())
    torch.testing.assert_close(sums, expected, rtol=0, atol=1e-11)


@pytest.mark.parametrize("mode", MODES)
def test_same_bits_for_any_threads(mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    vectors, ids = torch.randn(9000, 16) * 1e3, torch.randint(0, 300, (9000,))
    results = []
    with kernels.use_kernels(mode):
        for threads in (1, 2, 5):
            monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
            results.append(kernels.code_sums(vectors, ids, 300)[1])
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


@pytest.mark.parametrize("mode", MODES)
def test_layout_gradient_and_errors(mode: str) -> None:
    ids = torch.tensor([0, 2, 2, 1])
    with kernels.use_kernels(mode):
        wide = torch.randn(4, 6, dtype=torch.float64)
        assert torch.equal(kernels.code_sums(wide[:, ::2], ids, 3)[1], kernels.code_sums(wide, ids, 3)[1][:, ::2])
        vectors = wide.clone().requires_grad_()
        assert torch.autograd.gradcheck(lambda v: kernels.code_sums(v, ids, 3)[1], (vectors,))
        with pytest.raises(ValueError, match=r"ids: expected values in 0 \.\. 1"):
            kernels.code_sums(wide, ids, 2)
        with pytest.raises(ValueError, match="ids: expected values"):
            kernels.code_sums(wide, ids - 1, 3)
        with pytest.raises(ValueError, match=r"ids: expected int64 \[4\], got int64 \[3\]"):
            kernels.code_sums(wide, ids[:3], 3)
        with pytest.raises(ValueError, match="vectors: expected float"):
            kernels.code_sums(wide.long(), ids, 3)


@pytest.mark.filterwarnings("ignore:The .grad attribute")  # opcheck looks at the gradients of its own copies
def test_opcheck() -> None:
    arguments = (torch.randn(4, 3), torch.tensor([0, 2, 2, 1]), 5)
    torch.library.opcheck(torch.ops.tokenizers_mm.code_sums.default, arguments)
