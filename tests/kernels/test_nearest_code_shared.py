"""nearest_code_shared against the float64 joint distance written out."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tokenizers_mm import kernels
from tokenizers_mm.kernels import _native

needs_native = pytest.mark.skipif(_native.cpu_or_none() is None, reason="the native library is not installed")
TIE = 1e-12


def parts(n: int, k: int, dims: tuple[int, ...], seed: int = 0) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    g = torch.Generator().manual_seed(seed)
    make = lambda rows: tuple(torch.randn(rows, d, generator=g) * (i + 1) for i, d in enumerate(dims))  # noqa: E731
    return make(n), make(k)


def joint(zs: tuple[Tensor, ...], codebooks: tuple[Tensor, ...], weights: tuple[float, ...], normalize: bool) -> Tensor:
    total = torch.zeros((), dtype=torch.float64)
    for z, c, weight in zip(zs, codebooks, weights, strict=True):
        z, c = z.double().reshape(-1, z.shape[-1]), c.double()
        if normalize:
            z, c = F.normalize(z, dim=-1), F.normalize(c, dim=-1)
        total = total + weight * (z[:, None] - c).square().sum(-1)
    return total


@pytest.mark.parametrize("mode", ["reference", pytest.param("native", marks=needs_native)])
@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("weights", [(1.0, 1.0), (1.0, 0.25), (0.0, 2.0)])
@pytest.mark.parametrize("dims", [(24, 8), (3, 2), (70, 33)])
def test_joint_distance(dims: tuple[int, ...], weights: tuple[float, ...], normalize: bool, mode: str) -> None:
    zs, codebooks = parts(150, 230, dims)
    with kernels.use_kernels(mode):
        ids, found = kernels.nearest_code_shared(zs, codebooks, weights, normalize=normalize, return_distance=True)
        assert torch.equal(ids, kernels.nearest_code_shared(zs, codebooks, weights, normalize=normalize))
    table = joint(zs, codebooks, weights, normalize)
    chosen = table.gather(1, ids[:, None])[:, 0]
    assert bool((chosen <= table.min(1).values * (1 + TIE)).all())
    torch.testing.assert_close(found.double(), chosen, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("mode", ["reference", pytest.param("native", marks=needs_native)])
def test_layout_dtype_and_ties(mode: str) -> None:
    zs, codebooks = parts(4 * 6, 50, (5, 7))
    codebooks = tuple(torch.cat([c, c]) for c in codebooks)
    grid = tuple(z.view(4, 6, -1) for z in zs)
    with kernels.use_kernels(mode):
        ids = kernels.nearest_code_shared(grid, codebooks)
        assert ids.shape == (4, 6)
        assert int(ids.max()) < 50
        plain = kernels.nearest_code(torch.cat(zs, 1), torch.cat(codebooks, 1))
        assert torch.equal(ids.flatten(), plain)
        assert kernels.nearest_code_shared(tuple(z[:0] for z in zs), codebooks).shape == (0,)
        half = kernels.nearest_code_shared(tuple(z.half() for z in zs), codebooks, normalize=True)
    table = joint(tuple(z.half() for z in zs), codebooks, (1.0, 1.0), True)
    assert torch.equal(half, table.argmin(1))


@needs_native
def test_joint_codebook_follows_changes_in_place() -> None:
    zs, codebooks = parts(40, 90, (6, 6))
    for _ in range(3):
        expected = joint(zs, codebooks, (1.0, 2.0), True).argmin(1)
        for _ in range(2):
            assert torch.equal(kernels.nearest_code_shared(zs, codebooks, (1.0, 2.0), normalize=True), expected)
        codebooks[1].copy_(codebooks[1].roll(1, 0))
    codebooks[0].data.copy_(codebooks[0].neg())
    expected = joint(zs, codebooks, (1.0, 2.0), True).argmin(1)
    assert torch.equal(kernels.nearest_code_shared(zs, codebooks, (1.0, 2.0), normalize=True), expected)


def test_gradients_and_errors() -> None:
    zs, codebooks = parts(5, 6, (3, 2))
    zs = tuple(z.double().requires_grad_() for z in zs)
    codebooks = tuple(c.double().requires_grad_() for c in codebooks)

    def distance(*tensors: Tensor) -> Tensor:
        return kernels.nearest_code_shared(tensors[:2], tensors[2:], (1.0, 0.5), normalize=True, return_distance=True)[
            1
        ]

    assert torch.autograd.gradcheck(distance, (*zs, *codebooks))
    with pytest.raises(ValueError, match=r"zs\[1\]: expected float \[\.\.\., 2\], got float64 \[5, 3\]"):
        kernels.nearest_code_shared((zs[0], zs[0]), codebooks)
    with pytest.raises(ValueError, match=r"codebooks\[1\]: expected \[6, D\]"):
        kernels.nearest_code_shared(zs, (codebooks[0], codebooks[1][:4]))
    with pytest.raises(ValueError, match="weights: expected >= 0"):
        kernels.nearest_code_shared(zs, codebooks, (1.0, -1.0))
    with pytest.raises(ValueError, match="zs: expected 2 parts"):
        kernels.nearest_code_shared(zs[:1], codebooks)


@pytest.mark.filterwarnings("ignore:The .grad attribute")  # opcheck looks at the gradients of its own copies
def test_opcheck() -> None:
    zs, codebooks = parts(5, 6, (3, 2))
    arguments = (list(zs), list(codebooks), [1.0, 0.5], True)
    torch.library.opcheck(torch.ops.tokenizers_mm.nearest_code_shared.default, arguments)
    torch.library.opcheck(torch.ops.tokenizers_mm.nearest_code_shared_margin.default, arguments)


@pytest.mark.parametrize("mode", ["reference", pytest.param("native", marks=needs_native)])
def test_a_compiled_search_refuses_what_is_not_finite(mode: str) -> None:
    zs, codebooks = parts(5, 6, (3, 2))

    def search(a: Tensor, b: Tensor) -> Tensor:
        return kernels.nearest_code_shared((a, b), codebooks, names=("semantic_head", "pixel_head"))

    compiled = torch.compile(search, fullgraph=True, backend="aot_eager")
    with kernels.use_kernels(mode):
        assert torch.equal(compiled(*zs), search(*zs))
        zs[1][3, 1] = torch.nan
        for call in (search, compiled):
            # torch 2.6 adds lines to the message.
            with pytest.raises(ValueError, match=r"^pixel_head: expected finite features, got NaN at \[3, 1\](\n|$)"):
                call(*zs)
