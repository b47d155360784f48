"""Integer rungs of every instruction set: exact at the edges of their ranges, the same bits everywhere."""

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from tests.kernels.test_nearest_code import distances, gauss, generator, pinned, wrong
from tokenizers_mm.kernels import _native, _ops
from tokenizers_mm.kernels._packed import PackedCodebook

pytestmark = pytest.mark.skipif(_native.cpu_or_none() is None, reason="the native library is not installed")
INTEGER = [name for name in _native.ISAS if name != "portable"]


@pytest.fixture(params=INTEGER)
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    library = _native.cpu()
    before = library.isa
    try:
        library.select_isa(request.param)
    except ValueError:
        pytest.skip(f"this CPU has no {request.param}")
    yield request.param
    library.select_isa(before)


def edge(kind: str, n: int, k: int, d: int) -> tuple[Tensor, Tensor]:
    """Tokens and codes whose quantised values sit at the ends of their ranges."""
    g = generator(d)
    signs = torch.randint(0, 2, (k, d), generator=g).float() * 2 - 1
    z, c = torch.randn(n, d, generator=g), torch.randn(k, d, generator=g)
    if kind == "flat":  # every product of a row at once: the sums of 16 bits are as large as they get
        c = torch.linspace(-1, 1, k)[:, None] * torch.ones(d) + 1e-3 * c
        z = torch.linspace(-1.2, 1.2, n)[:, None] * torch.ones(d) + 1e-3 * z
    elif kind == "signs":  # |c| at its largest everywhere
        c = signs + 1e-4 * c
        z = signs[torch.randint(0, k, (n,), generator=g)] + 1e-4 * z
    elif kind == "runs":  # a token's mass in 8 neighbouring dimensions, or in either half of them
        start = torch.randint(0, d, (n, 1), generator=g)
        inside = (torch.arange(d) - start).remainder(d) < 8
        halves = torch.arange(d) % 4 < 2
        z = inside * torch.where(torch.arange(n)[:, None] % 2 == 0, torch.ones(d), halves.float()) * 3 + 0.01 * z
        c = signs * 0.999 + 1e-3 * c
    elif kind == "one dimension":  # the largest value of a row by far
        z[:, 0], c[:, 0] = 200 * z[:, 0], 200 * c[:, 0]
    elif kind == "wide":  # a few dimensions kept in 16 bits beside saturating ones
        strong = torch.where(torch.arange(d) % 37 == 5, 25.0, 1.0)
        z = (torch.linspace(-1.2, 1.2, n)[:, None] + 1e-3 * z) * strong
        c = (torch.linspace(-1, 1, k)[:, None] * signs.abs() + 1e-3 * c) * strong
    elif kind == "split":  # runs of 16 dimensions with their mass next to each other; 4 in 16 bits
        strong = torch.where(torch.arange(d) >= d - 4, 25.0, 1.0)
        inside = (torch.arange(d) - 8).remainder(32) < 16
        z = (torch.linspace(-1.2, 1.2, n)[:, None] * inside + 1e-3 * z) * strong
        c = (torch.linspace(-1, 1, k)[:, None] + 1e-3 * c) * strong
    return z, c


@pytest.mark.parametrize("d", [1, 4, 7, 16, 31, 33, 64, 257, 530, 800])
@pytest.mark.parametrize("kind", ["gauss", "flat", "signs", "runs", "one dimension", "wide", "split"])
def test_edges_of_the_ranges(kind: str, d: int, isa: str) -> None:
    """A sum beyond its range breaks the certificate: the answer is wrong."""
    z, c = edge(kind, 37, 150, d)
    for method in ("int8", "int16"):
        ids, found = pinned(method, z, c)
        assert wrong(ids, z, c) == 0
        expected = distances(z, c).gather(1, ids[:, None])[:, 0].float()
        torch.testing.assert_close(found, expected, rtol=2e-7, atol=0)


@pytest.mark.parametrize("d", [2048, 2052])
def test_long_tokens(d: int, isa: str) -> None:
    """Tiles hold tokens of up to 2,048 values."""
    z, c = edge("gauss", 40, 70, d)
    assert wrong(pinned("int8", z, c)[0], z, c) == 0


@pytest.mark.parametrize("d", [24, 70, 300])
def test_same_bits_on_every_path(d: int, isa: str) -> None:
    """Threads, splits of the batch, method and instruction set change no bit of the answer."""
    z, c = gauss(230, 700, d)
    c[350:] = c[:350]
    expected_ids, expected = pinned("brute", z, c)
    for method in ("auto", "int8", "int16", "float32", "difference"):
        for threads in (1, 2, 5):
            ids, found = pinned(method, z, c, threads)
            assert torch.equal(ids, expected_ids)
            assert torch.equal(found, expected)
    ids = torch.cat([pinned("int8", part, c)[0] for part in z.split(61)])
    assert torch.equal(ids, expected_ids)


@pytest.mark.parametrize("scale", [1e-30, 1e-18, 1.0, 1e15, 1e19])
def test_float32_filter_never_drops_the_nearest(scale: float, isa: str) -> None:
    """Distances that underflow or overflow float32, and codes a few units of float32 apart."""
    g = generator(3)
    c = torch.randn(1, 64, generator=g) * (1 + 2e-7 * torch.randn(300, 64, generator=g))
    z = c[torch.randint(0, 300, (50,), generator=g)] * (1 + 1e-7 * torch.randn(50, 64, generator=g))
    for method in ("brute", "int16", "auto"):
        ids, _ = pinned(method, z * scale, c * scale)
        assert wrong(ids, z * scale, c * scale) == 0
    far = torch.randn(20, 64, generator=g) * scale
    assert wrong(pinned("brute", far, c)[0], far, c) == 0


def test_the_best_integer_rung_is_chosen_first(isa: str) -> None:
    z, c = gauss(256, 4096, 32)
    packed = PackedCodebook(_native.cpu(), c, False)
    answer = _ops._empty(z.shape[:1], z.dtype, "d")
    assert packed.search(c, z, answer, 1) == _native.OK
    assert packed.method == "int8"
    assert wrong(answer.ids, z, c) == 0


def test_the_tree_is_made_once_enough_rows_have_come(isa: str) -> None:
    """A few hundred rows do not pay for it; the answer is the same before and after, and in one call."""
    z, c = gauss(4000, 3000, 6)
    packed, ids, methods = PackedCodebook(_native.cpu(), c, False), [], []
    for part in z.split(400):
        answer = _ops._empty(part.shape[:1], z.dtype, "d")
        assert packed.search(c, part, answer, 2) == _native.OK
        ids.append(answer.ids)
        methods.append(packed.method)
    assert methods[0] != "tree"
    assert methods[-1] == "tree"
    assert wrong(torch.cat(ids), z, c) == 0
    assert torch.equal(pinned("auto", z, c)[0], torch.cat(ids))


@pytest.mark.parametrize("n", [1, 31, 32, 47, 48, 95, 193, 1000])
def test_the_sample_and_the_other_rows_are_all_rows(n: int, isa: str) -> None:
    z, c = gauss(n, 900, 40)
    for threads in (1, 3):
        ids, found = pinned("auto", z, c, threads)
        assert wrong(ids, z, c) == 0
        torch.testing.assert_close(found, distances(z, c).gather(1, ids[:, None])[:, 0].float(), rtol=2e-7, atol=0)
