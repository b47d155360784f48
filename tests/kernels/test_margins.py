"""return_margin against float64: each method of each instruction set, any number of threads, any split of a batch."""

from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.kernels.test_nearest_code import AWKWARD, awkward, distances, gauss, generator, search, wrong
from tokenizers_mm import kernels
from tokenizers_mm.kernels import _native

LIBRARY = _native.cpu_or_none()
needs_native = pytest.mark.skipif(LIBRARY is None, reason="the native library is not installed")


def expected_margin(z: Tensor, codebook: Tensor, ids: Tensor) -> Tensor:
    """Distance of the nearest code of another value than the chosen one, less that of the chosen one, in float64."""
    table = distances(z, codebook)
    chosen = table.gather(1, ids[:, None])[:, 0]
    same = (codebook[:, None] == codebook[None]).all(-1)[ids] if len(codebook) <= 1000 else None
    if same is None:
        same = torch.stack([(codebook == codebook[i]).all(-1) for i in ids])
    other = torch.where(same, torch.inf, table).min(1).values
    gap = torch.where(other.isinf(), torch.inf, (other - chosen) / (other.sqrt() + chosen.sqrt()))
    return torch.where(other > chosen, gap, 0.0)


def check(z: Tensor, codebook: Tensor, ids: Tensor, margin: Tensor) -> None:
    """Equal to the float64 margin; differences of distances within their rounding count as equal."""
    assert wrong(ids, z, codebook) == 0
    expected = expected_margin(z, codebook, ids)
    scale = distances(z, codebook).gather(1, ids[:, None])[:, 0].sqrt()
    error = (margin.double() - expected).abs()
    error = torch.where(margin.double() == expected, 0.0, error)  # infinities
    assert bool((error <= 2e-7 * expected + 1e-14 * scale + 2e-45).all()), float(error.max())


@pytest.fixture(params=["native", "reference"])
def path(request: pytest.FixtureRequest) -> Iterator[str]:
    if request.param == "native" and LIBRARY is None:
        pytest.skip("the native library is not installed")
    with kernels.use_kernels(request.param):
        yield request.param


@pytest.fixture(params=_native.ISAS)
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    library = _native.cpu()
    best = library.isa
    try:
        library.select_isa(request.param)
    except ValueError:
        pytest.skip(f"this CPU has no {request.param}")
    yield request.param
    library.select_isa(best)


@pytest.mark.parametrize(
    "shape",
    [(1, 1, 1), (3, 2, 3), (2, 700, 32), (60, 64, 5), (50, 1000, 8), (90, 129, 33), (40, 3000, 10), (9, 200, 300)],
)
def test_shapes(shape: tuple[int, int, int], path: str) -> None:
    z, c = gauss(*shape, seed=sum(shape))
    ids, margin = kernels.nearest_code(z, c, return_margin=True)
    assert torch.equal(ids, kernels.nearest_code(z, c))
    check(z, c, ids, margin)
    again, found, same = kernels.nearest_code(z, c, return_distance=True, return_margin=True)
    assert torch.equal(again, ids)
    assert torch.equal(same, margin)
    assert torch.equal(found, kernels.nearest_code(z, c, return_distance=True)[1])


@needs_native
@pytest.mark.parametrize("method", ["int8", "int16", "float32", "difference", "tree", "brute"])
@pytest.mark.parametrize("name", ["gauss", *AWKWARD])
def test_every_method_of_every_instruction_set(name: str, method: str, isa: str) -> None:
    z, c = awkward(name, n=60, k=500, d=11)
    if name == "gauss":
        c[250:] = c[torch.randint(0, 250, (250,), generator=generator(1))]  # repetitions everywhere
    answer = search(method, z, c, margins=True)
    assert answer.margin is not None
    check(z, c, answer.ids, answer.margin)


@pytest.mark.parametrize("name", AWKWARD)
def test_awkward_codebooks(name: str, path: str) -> None:
    for d in (24, 6):
        z, c = awkward(name, n=120, d=d)
        for rows in (z, z[:2]):
            check(rows, c, *kernels.nearest_code(rows, c, return_margin=True))


@needs_native
@pytest.mark.parametrize("d", [2, 3, 8])
@pytest.mark.parametrize("kind", ["gauss", "repeated", "lattice", "last"])
def test_trees_of_many_codes(d: int, kind: str, isa: str) -> None:
    z, c = gauss(100, 5000, d, d)
    if kind == "repeated":
        c[2500:] = c[:2500]
    elif kind == "lattice":  # thousands of codes of one norm, which the removal of repetitions gives up on
        z, c = (z * 3).round(), (c * 3).round()
    elif kind == "last":  # the code that fills the unused slots of the tree is the nearest of all
        z = c[-1:] + 1e-3 * z
    answer = search("tree", z, c, margins=True)
    assert answer.margin is not None
    check(z, c, answer.ids, answer.margin)


def test_ties_have_no_margin(path: str) -> None:
    """Two different codes at the same distance: the lower index, a margin of zero; two equal codes do not count."""
    for d in (2, 40):
        c = torch.zeros(600, d)
        c[:, 0] = torch.arange(600.0)
        z = torch.zeros(4, d)
        z[:, 0] = torch.tensor([3.5, 3.0, 0.0, 599.0])
        for rows in (z, z[:1]):
            ids, margin = kernels.nearest_code(rows, c, return_margin=True)
            assert ids.tolist() == [3, 3, 0, 599][: len(rows)]
            assert margin.tolist() == [0.0, 1.0, 1.0, 1.0][: len(rows)]
        ids, margin = kernels.nearest_code(z, c[:1].expand(600, d), return_margin=True)
        assert not ids.any()
        assert margin.isposinf().all()
        negative = torch.cat([c[:1], -0.0 * c[:1], c[:2]])  # -0 and 0 are one value
        assert kernels.nearest_code(z[2:3], negative, return_margin=True)[1].tolist() == [1.0]


@pytest.mark.parametrize("z_type", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("c_type", [torch.bfloat16, torch.float32, torch.float64])
def test_dtypes(z_type: torch.dtype, c_type: torch.dtype, path: str) -> None:
    z, c = gauss(50, 200, 20)
    z, c = z.to(z_type), c.to(c_type)
    ids, margin = kernels.nearest_code(z, c, return_margin=True)
    assert margin.dtype == (torch.float64 if torch.float64 in (z_type, c_type) else torch.float32)
    check(z, c, ids, margin)


@needs_native
@pytest.mark.parametrize(("k", "d"), [(900, 32), (2000, 8)])
def test_same_bits_for_any_threads_and_batches(k: int, d: int, monkeypatch: pytest.MonkeyPatch) -> None:
    z, c = gauss(1000, k, d)
    with kernels.use_kernels("reference"):
        expected = kernels.nearest_code(z, c, return_margin=True)
    for threads in (1, 2, 5):
        monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
        for size in (1000, 499, 2, 1):
            parts = [kernels.nearest_code(part, c, return_margin=True) for part in z[: size * 400].split(size)]
            for got, full in zip(map(torch.cat, zip(*parts, strict=True)), expected, strict=True):
                torch.testing.assert_close(got, full[: size * 400], rtol=1e-6, atol=0)
            ids, margin = kernels.nearest_code(z, c, return_margin=True)
            assert torch.equal(torch.cat([part[1] for part in parts]), margin[: size * 400])
            assert torch.equal(torch.cat([part[0] for part in parts]), ids[: size * 400])


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("weights", [(1.0, 1.0), (1.0, 0.25)])
def test_shared_index(weights: tuple[float, float], normalize: bool, path: str) -> None:
    z, c = gauss(80, 300, 12)
    c[200:] = c[:100]
    zs, codebooks = z.split((8, 4), 1), c.split((8, 4), 1)
    ids, found, margin = kernels.nearest_code_shared(
        zs, codebooks, weights, normalize=normalize, return_distance=True, return_margin=True
    )
    assert torch.equal(ids, kernels.nearest_code_shared(zs, codebooks, weights, normalize=normalize))
    assert found.dtype == margin.dtype == torch.float32
    parts = [
        (F.normalize(a.double(), dim=-1), F.normalize(b.double(), dim=-1)) for a, b in zip(zs, codebooks, strict=True)
    ]
    parts = parts if normalize else [(a.double(), b.double()) for a, b in zip(zs, codebooks, strict=True)]
    joint = [torch.cat([part[i] * w**0.5 for part, w in zip(parts, weights, strict=True)], 1) for i in (0, 1)]
    table = torch.cdist(joint[0], joint[1], compute_mode="donot_use_mm_for_euclid_dist")
    same = (c[:, None] == c[None]).all(-1)[ids]
    least = table.gather(1, ids[:, None])[:, 0]
    expected = torch.where(same, torch.inf, table).min(1).values - least
    torch.testing.assert_close(margin.double(), expected, rtol=1e-5, atol=1e-6)
    only = kernels.nearest_code_shared(zs, codebooks, weights, normalize=normalize, return_margin=True)
    assert torch.equal(only[1], margin)


def test_the_id_is_stable_within_half_the_margin(path: str) -> None:
    z, c = gauss(200, 400, 6)
    ids, margin = kernels.nearest_code(z, c, return_margin=True)
    direction = F.normalize(torch.randn(200, 6, generator=generator(2)), dim=1)
    moved = z + 0.499 * margin[:, None] * direction
    assert torch.equal(kernels.nearest_code(moved, c), ids)
    toward = c[ids] - z  # straight at the runner-up it does change before the whole margin is used up, for some rows
    assert not torch.equal(kernels.nearest_code(z - 30 * margin[:, None] * F.normalize(toward, dim=1), c), ids)
