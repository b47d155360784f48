"""nearest_code against an independent float64 difference form: every path, dtype, layout and awkward codebook."""

import ctypes
import os
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

from tokenizers_mm import kernels
from tokenizers_mm.kernels import _native, _ops
from tokenizers_mm.kernels._packed import MAX_ENTRIES, MAX_ORPHANS, Answer, PackedCodebook

TIE = 1e-12  # relative; two codes closer than this are a rounding tie of float64 itself
LIBRARY = _native.cpu_or_none()
needs_native = pytest.mark.skipif(LIBRARY is None, reason="the native library is not installed")


def distances(z: Tensor, codebook: Tensor) -> Tensor:
    """[N, K] squared distances in float64, difference form, a few rows at a time."""
    rows = max(1, (1 << 22) // codebook.numel())
    parts = [(part[:, None] - codebook.double()).square().sum(-1) for part in z.double().split(rows)]
    return torch.cat(parts) if parts else torch.empty(0, codebook.shape[0], dtype=torch.float64)


def wrong(ids: Tensor, z: Tensor, codebook: Tensor) -> int:
    """Rows whose index is not the float64 argmin, lowest index on ties; different codes within TIE count as right."""
    table = distances(z, codebook)
    table = torch.where(torch.isfinite(table), table, torch.inf)
    least, expected = table.min(1)
    chosen = table.gather(1, ids.reshape(-1, 1))[:, 0]
    repeated = (codebook[expected] == codebook[ids.reshape(-1)]).all(-1)
    right = (expected == ids.reshape(-1)) | ((chosen <= least * (1 + TIE)) & ~repeated)
    return int((~right).sum())


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def gauss(n: int, k: int, d: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    g = generator(seed)
    return torch.randn(n, d, generator=g), torch.randn(k, d, generator=g)


def awkward(name: str, n: int = 300, k: int = 700, d: int = 24) -> tuple[Tensor, Tensor]:
    """Codebooks that defeat a fixed quantisation, each in its own way."""
    g = generator(7)
    z, c = gauss(n, k, d, 11)
    if name == "tiny uniform":
        c = (torch.rand(k, d, generator=g) * 2 - 1) / k
    elif name == "every code twice":
        c[k // 2 :] = c[: k // 2]
    elif name == "all identical":
        c = c[:1].expand(k, d).clone()
    elif name == "one differs":
        c = c[:1].repeat(k, 1)
        c[-1] += 1
    elif name == "log-normal norms":
        c *= torch.exp(2 * torch.randn(k, 1, generator=g))
    elif name == "clumped at the mean":
        c[: 9 * k // 10] *= 1e-4
        z[: n // 2] *= 1e-4
    elif name == "far clump":
        c[: k // 2] = 1e4 + torch.randn(k // 2, d, generator=g)
    elif name == "heavy tails":
        z = z / torch.rand(n, d, generator=g).pow(2)
        c = c / torch.rand(k, d, generator=g)
    elif name == "scaled dimensions":
        scale = torch.exp(1.5 * torch.randn(d, generator=g))
        z, c = z * scale, c * scale
    elif name == "offset":
        z, c = z + 1000, c + 1000
    elif name == "far tokens":
        z *= torch.logspace(0, 12, n)[:, None]
    elif name == "codes as tokens":
        z = c[torch.randint(0, k, (n,), generator=g)].clone()
    elif name == "lattice":
        z, c = torch.randint(-2, 3, (n, d), generator=g).float(), torch.randint(-1, 2, (k, d), generator=g).float()
    elif name == "denormal":
        z, c = z * 1e-41, c * 1e-41
    elif name == "huge":
        z, c = z * 1e37, c * 1e37
    elif name == "zero tokens":
        z = torch.zeros(n, d)
    return z, c


AWKWARD = [
    "tiny uniform",
    "every code twice",
    "all identical",
    "one differs",
    "log-normal norms",
    "clumped at the mean",
    "far clump",
    "heavy tails",
    "scaled dimensions",
    "offset",
    "far tokens",
    "codes as tokens",
    "lattice",
    "denormal",
    "huge",
    "zero tokens",
]


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


def pinned(method: str, z: Tensor, codebook: Tensor, threads: int = 2) -> tuple[Tensor, Tensor]:
    """Ids and distances of a native search by one method; skipped where the instruction set lacks it."""
    answer = search(method, z, codebook, threads)
    assert answer.distance is not None
    return answer.ids, answer.distance


def search(method: str, z: Tensor, codebook: Tensor, threads: int = 2, margins: bool = False) -> Answer:
    try:
        packed = PackedCodebook(_native.cpu(), codebook, False, _native.METHODS.index(method))
    except _native.NativeUnavailableError:
        pytest.skip(f"no {method} here")
    answer = _ops._empty(z.shape[:1], z.dtype, "dm" if margins else "d")
    status = packed.search(codebook, z, answer, threads)
    assert status in (_native.OK, _native.BAD_QUERY)
    return answer


SHAPES = [(97, 64, d) for d in (1, 2, 3, 5, 8, 9, 16, 17, 31, 32, 33, 64, 65, 255, 257)] + [
    (1, 1, 1), (5, 1, 7), (7, 2, 3), (50, 1000, 8), (101, 63, 12), (33, 65, 12), (200, 129, 32), (64, 3000, 10),
    (12, 300, 768), (9, 200, 1152), (600, 517, 4), (20, 20000, 6),
]  # fmt: skip


@pytest.mark.parametrize("shape", SHAPES)
def test_shapes(shape: tuple[int, int, int], path: str) -> None:
    z, c = gauss(*shape, seed=sum(shape))
    ids, found = kernels.nearest_code(z, c, return_distance=True)
    assert wrong(ids, z, c) == 0
    expected = distances(z, c).gather(1, ids[:, None])[:, 0].float()
    torch.testing.assert_close(found, expected, rtol=2e-7, atol=0)


@pytest.mark.parametrize("name", AWKWARD)
def test_awkward_codebooks(name: str, path: str) -> None:
    for d in (24, 6):
        z, c = awkward(name, d=d)
        assert wrong(kernels.nearest_code(z, c), z, c) == 0


@needs_native
@pytest.mark.parametrize("method", ["int8", "int16", "float32", "difference", "tree", "brute"])
@pytest.mark.parametrize("name", ["gauss", *AWKWARD])
def test_every_method_of_every_instruction_set(name: str, method: str, isa: str) -> None:
    z, c = awkward(name, n=120, d=11)
    ids, found = pinned(method, z, c)
    assert wrong(ids, z, c) == 0
    expected = distances(z, c).gather(1, ids[:, None])[:, 0].float()
    torch.testing.assert_close(found, expected, rtol=2e-7, atol=0)


@needs_native
@pytest.mark.parametrize("strong", [3.0, 30.0, 3000.0])
@pytest.mark.parametrize("d", [31, 32, 70, 130])
def test_int8_with_strong_dimensions(d: int, strong: float) -> None:
    """A few dimensions are kept in 16 bits; some tokens are strong elsewhere, or off the codebook's scale."""
    z, c = gauss(150, 700, d, d)
    scale = torch.where(torch.arange(d) % 33 == 5, strong, 1.0)
    z, c = z * scale, c * scale + 7 * scale
    z = z + 7 * scale
    z[:30] = z[:30].flip(1)
    z[30:40] *= torch.logspace(-3, 6, 10)[:, None]
    c[100:200] = c[:100]
    ids, found = pinned("int8", z, c)
    assert wrong(ids, z, c) == 0
    torch.testing.assert_close(found, distances(z, c).gather(1, ids[:, None])[:, 0].float(), rtol=2e-7, atol=0)


@needs_native
@pytest.mark.parametrize("kind", ["gauss", "sphere", "far tokens", "one axis", "clump", "lattice", "offset"])
@pytest.mark.parametrize("d", [1, 2, 3, 6, 7, 8, 11, 12])
def test_tree_of_many_codes(d: int, kind: str, isa: str) -> None:
    """Enough codes for several levels of boxes, and the corners of the 16-bit grid."""
    z, c = gauss(200, 5000 + 37 * d, d, d)
    if kind == "sphere":
        z, c = torch.nn.functional.normalize(z, dim=1), torch.nn.functional.normalize(c, dim=1)
    elif kind == "far tokens":
        z *= torch.logspace(-2, 4, len(z))[:, None]
    elif kind == "one axis":
        z, c = (x * torch.logspace(0, -3, d) for x in (z, c))
    elif kind == "clump":
        c[: len(c) // 2] += 300
    elif kind == "lattice":
        z, c = (z * 3).round(), (c * 3).round()
    elif kind == "offset":
        z, c = z + 1000, c + 1000
    z[7, 0], z[9, 0] = torch.nan, torch.inf
    ids, _ = pinned("tree", z, c)
    assert ids[[7, 9]].tolist() == [-1, -1]
    keep = torch.ones(len(z), dtype=torch.bool)
    keep[[7, 9]] = False
    assert wrong(ids[keep], z[keep], c) == 0
    alone, found = pinned("tree", z[:50], c, threads=1)
    assert torch.equal(alone, ids[:50])
    expected = distances(z[:7], c).gather(1, ids[:7, None])[:, 0].float()
    torch.testing.assert_close(found[:7], expected, rtol=2e-7, atol=0)


@needs_native
@pytest.mark.parametrize("seed", range(12))
def test_random_codebooks(seed: int, isa: str) -> None:
    """Random shapes, scales, offsets, duplicates and dtypes."""
    g = generator(seed)
    n, k, d = (int(torch.randint(1, top, (), generator=g)) for top in (260, 900, 70))
    z, c = gauss(n, k, d, seed)
    c *= torch.exp(torch.randn((), generator=g) * 5)
    z = z * torch.exp(torch.randn((), generator=g)) * c.std().nan_to_num(1.0) + torch.randn(d, generator=g) * seed
    c[torch.randint(0, k, (k // 3,), generator=g)] = c[torch.randint(0, k, (k // 3,), generator=g)]
    if seed % 3 == 0:
        z, c = z.double() + 1e-9, c.double()
    assert wrong(kernels.nearest_code(z, c), z, c) == 0


@pytest.mark.parametrize("z_type", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("c_type", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_dtypes(z_type: torch.dtype, c_type: torch.dtype, path: str) -> None:
    z, c = gauss(130, 200, 20)
    z, c = z.to(z_type), c.to(c_type)
    ids, found = kernels.nearest_code(z, c, return_distance=True)
    assert wrong(ids, z, c) == 0
    assert found.dtype == (torch.float64 if torch.float64 in (z_type, c_type) else torch.float32)


def test_float64_differences_below_float32(path: str) -> None:
    c = torch.full((40, 16), 3.0, dtype=torch.float64)
    c += torch.arange(40)[:, None] * 1e-11
    assert torch.equal(kernels.nearest_code(c.flip(0), c), torch.arange(39, -1, -1))


def test_layouts(path: str) -> None:
    z, c = gauss(6 * 5 * 7, 90, 12)
    expected = kernels.nearest_code(z, c)
    image = z.view(6, 5, 7, 12).permute(0, 3, 1, 2).contiguous().permute(0, 2, 3, 1)
    assert torch.equal(kernels.nearest_code(image, c), expected.view(6, 5, 7))
    assert torch.equal(kernels.nearest_code(z[::2], c), expected[::2])
    assert torch.equal(kernels.nearest_code(z.t().contiguous().t(), c.t().contiguous().t()), expected)
    assert torch.equal(kernels.nearest_code(z[:1].expand(9, 12), c), expected[:1].expand(9))
    shifted = torch.cat([torch.zeros(1), z.flatten()])[1:].view_as(z)  # not aligned to its vectors
    assert torch.equal(kernels.nearest_code(shifted, torch.cat([c, c], 1)[:, :12]), expected)
    assert kernels.nearest_code(z[0], c).shape == ()


@needs_native
def test_large_strided_input_goes_in_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_ops, "COPY_ELEMENTS", 64)
    z, c = gauss(4 * 9 * 5, 90, 12)
    image = z.view(4, 9, 5, 12).permute(0, 3, 1, 2).contiguous().permute(0, 2, 3, 1)
    assert torch.equal(kernels.nearest_code(image, c), kernels.nearest_code(z, c).view(4, 9, 5))


@pytest.mark.parametrize("n", [1, 2, 64])
@pytest.mark.parametrize(("k", "d"), [(300, 16), (900, 8), (5, 3)])
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_not_finite_is_an_error_that_names_the_place(
    n: int, k: int, d: int, value: float, dtype: torch.dtype, path: str
) -> None:
    z, c = (x.to(dtype) for x in gauss(n, k, d))
    kernels.nearest_code(z, c)
    bad = z.clone()
    bad[n - 1, d // 2] = value
    kind = "NaN" if value != value else "infinity"
    for _ in range(2):
        with pytest.raises(ValueError, match=rf"^z: expected finite features, got {kind} at \[{n - 1}, {d // 2}\]$"):
            kernels.nearest_code(bad, c)
    with pytest.raises(ValueError, match=r"^pixel_head: expected finite features"):
        kernels.nearest_code(bad, c, name="pixel_head", return_margin=True)
    codes = c.clone()
    codes[k - 1, d - 1] = value
    for _ in range(2):
        with pytest.raises(ValueError, match=rf"^codebook: expected finite codes, got {kind} at \[{k - 1}, {d - 1}\]$"):
            kernels.nearest_code(z, codes, return_distance=True)
    with pytest.raises(ValueError, match="zs\\[1\\]: expected finite features"):
        kernels.nearest_code_shared((z, bad), (c, c))
    with pytest.raises(ValueError, match="codebooks\\[0\\]: expected finite codes"):
        kernels.nearest_code_shared((z, z), (codes, c))


@pytest.mark.parametrize("compiled", [False, True])
def test_finite_ids(compiled: bool) -> None:
    call = torch.compile(kernels.finite_ids, fullgraph=True, backend="aot_eager") if compiled else kernels.finite_ids
    z, ids = torch.randn(4, 3), torch.arange(4)
    assert torch.equal(call(z, ids), ids)
    z[2, 1] = torch.nan
    # torch 2.6 adds lines to the message.
    with pytest.raises(ValueError, match=r"^z: expected finite features, got NaN at \[2, 1\](\n|$)"):
        call(z, ids)


def test_overflow_of_finite_values(path: str) -> None:
    z, c = gauss(64, 300, 16)
    far, codes = z * 1e20, c * 1e20
    assert wrong(kernels.nearest_code(far, codes), far, codes) == 0
    ids, found, margin = kernels.nearest_code(z.double() * 1e300, c.double(), return_distance=True, return_margin=True)
    assert not ids.any()
    assert found.isposinf().all()
    assert not margin.any()


def test_empty_and_errors(path: str) -> None:
    z, c = gauss(4, 5, 3)
    assert kernels.nearest_code(z[:0], c).shape == (0,)
    assert kernels.nearest_code(torch.empty(2, 0, 3), c).shape == (2, 0)
    with pytest.raises(ValueError, match=r"z: expected float \[\.\.\., 3\], got float32 \[4, 2\]"):
        kernels.nearest_code(z[:, :2], c)
    with pytest.raises(ValueError, match=r"codebook: expected float \[K, D\], K and D >= 1, got float32 \[0, 3\]"):
        kernels.nearest_code(z, c[:0])
    with pytest.raises(ValueError, match="codebook: expected"):
        kernels.nearest_code(z[:, :0], c[:, :0])
    with pytest.raises(ValueError, match="got int64"):
        kernels.nearest_code(z.long(), c)


@needs_native
@pytest.mark.parametrize(("k", "d"), [(900, 32), (2000, 8)])
def test_same_bits_for_any_threads_and_batches(k: int, d: int, monkeypatch: pytest.MonkeyPatch) -> None:
    z, c = gauss(1500, k, d)
    ids, found = kernels.nearest_code(z, c, return_distance=True)
    for threads in (1, 2, 5):
        monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
        for size in (1500, 499, 1):
            parts = [kernels.nearest_code(part, c, return_distance=True) for part in z[:1000].split(size)]
            assert torch.equal(torch.cat([part[0] for part in parts]), ids[:1000])
            assert torch.equal(torch.cat([part[1] for part in parts]), found[:1000])


@needs_native
def test_same_bits_for_any_instruction_set(isa: str) -> None:
    z, c = gauss(200, 500, 40)
    ids, found = pinned("float32", z, c)
    _native.cpu().select_isa("portable")
    other_ids, other = pinned("float32", z, c)
    assert torch.equal(ids, other_ids)
    assert torch.equal(found, other)


@needs_native
def test_ladder_leaves_int8_where_it_must() -> None:
    if _native.cpu().isa == "portable":
        pytest.skip("no int8 here")
    kernels.invalidate()
    used = {}
    for name in ("gauss", "log-normal norms"):
        z, c = awkward(name, n=256, k=4096, d=32)
        kernels.nearest_code(z, c)
        used[name] = next(reversed(_ops.cache._entries.values())).packed.method
    assert used["gauss"] == "int8"
    assert used["log-normal norms"] in ("int16", "float32", "difference")


def write_data(c: Tensor) -> None:
    c.data.neg_()


def write_one_row(c: Tensor) -> None:
    c.data[len(c) // 2] = 0.5


def write_one_bit(c: Tensor) -> None:
    c.data.view(torch.int32)[-1, -1] ^= 1 << 22


def write_numpy(c: Tensor) -> None:
    c.detach().numpy()[:] = c.detach().roll(1, 0).numpy()


def write_pointer(c: Tensor) -> None:
    ctypes.memmove(c.data_ptr(), (c.detach() * -3).contiguous().data_ptr(), c.numel() * c.element_size())


def write_other_process(c: Tensor) -> None:
    child = os.fork()
    if child == 0:
        c.data.neg_()
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def write_inference_mode(c: Tensor) -> None:
    with torch.inference_mode():
        c.neg_()


def swap_halves(c: Tensor) -> None:
    """The same words at other places, so that no sum of them changes."""
    c.data.copy_(torch.cat([c[len(c) // 2 :], c[: len(c) // 2]]))


WRITERS = [
    write_data,
    write_one_row,
    write_one_bit,
    write_numpy,
    write_pointer,
    write_other_process,
    write_inference_mode,
    swap_halves,
]


@needs_native
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # fork in a process with threads
@pytest.mark.parametrize("writer", WRITERS)
@pytest.mark.parametrize(("n", "k", "d"), [(1, 800, 32), (40, 800, 32), (1, 1000, 8), (40, 1000, 8), (40, 300, 100)])
def test_no_pack_outlives_what_it_was_made_of(writer: Callable[[Tensor], None], n: int, k: int, d: int) -> None:
    """Whoever writes, however, and whatever the method of the search."""
    z, c = gauss(n, k, d)
    c.share_memory_()
    view = torch.cat([c, c], 1)  # its left half is not contiguous
    for _ in range(3):
        for codes in (c, view[:, :d]):
            assert wrong(kernels.nearest_code(z, codes), z, codes) == 0
            shared = kernels.nearest_code_shared((z, z), (codes, codes))
            assert wrong(shared, z, codes) == 0
        writer(c)
        view.data[:, :d] = c


@needs_native
def test_trusted_version() -> None:
    z, c = gauss(40, 700, 16)
    assert wrong(kernels.nearest_code(z, c, trust_version=True), z, c) == 0
    former = kernels.nearest_code(z, c, trust_version=True)
    c.neg_()
    assert wrong(kernels.nearest_code(z, c, trust_version=True), z, c) == 0
    c.data.neg_()  # what the caller promised not to do
    assert not torch.equal(kernels.nearest_code(z, c, trust_version=True), former)
    assert torch.equal(kernels.nearest_code(z, c), former)
    assert torch.equal(kernels.nearest_code(z, c, trust_version=True), former)


@needs_native
def test_packs_are_bounded_freed_and_found_again() -> None:
    kernels.invalidate()
    z = torch.randn(40, 16)
    for _ in range(40):
        codebook = torch.randn(300, 16)
        assert wrong(kernels.nearest_code(z, codebook), z, codebook) == 0
    assert len(_ops.cache) <= 1 + MAX_ORPHANS
    kept = [torch.randn(300, 16) for _ in range(40)]
    for codebook in kept:
        kernels.nearest_code(z, codebook)
    assert len(_ops.cache) == MAX_ENTRIES
    kernels.invalidate()
    assert len(_ops.cache) == 0
    for _ in range(3):  # one tensor written to: its former content is not kept
        kernels.nearest_code(z, kept[0])
        kept[0] += 1
    assert len(_ops.cache) == 1
    kernels.nearest_code(z, kept[1])
    packed = next(reversed(_ops.cache._entries.values())).packed
    kernels.nearest_code(z, kept[1].clone())  # the same content elsewhere
    assert next(reversed(_ops.cache._entries.values())).packed is packed


@needs_native
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # fork in a process with threads: the case under test
def test_fork_after_use() -> None:
    z, c = gauss(600, 600, 32)
    expected = kernels.nearest_code(z, c)
    child = os.fork()
    if child == 0:
        os._exit(0 if torch.equal(kernels.nearest_code(z, c), expected) else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def test_gradients_of_the_distance(path: str) -> None:
    z, c = (tensor.double().requires_grad_() for tensor in gauss(6, 5, 3))
    assert torch.autograd.gradcheck(lambda a, b: kernels.nearest_code(a, b, return_distance=True)[1], (z, c))
    assert torch.autograd.gradgradcheck(lambda a, b: kernels.nearest_code(a, b, return_distance=True)[1], (z, c))
    assert not kernels.nearest_code(z, c).requires_grad


@pytest.mark.filterwarnings("ignore:The .grad attribute")  # opcheck looks at the gradients of its own copies
def test_opcheck(path: str) -> None:
    z, c = gauss(6, 5, 3)
    torch.library.opcheck(torch.ops.tokenizers_mm.nearest_code.default, (z, c))
    torch.library.opcheck(torch.ops.tokenizers_mm.nearest_code_distance.default, (z, c))
    torch.library.opcheck(torch.ops.tokenizers_mm.nearest_code_margin.default, (z, c, True, "features"))
    torch.library.opcheck(torch.ops.tokenizers_mm.finite_ids.default, (z, torch.arange(6), "features"))


def test_compile_and_export(path: str) -> None:
    def step(z: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
        return kernels.nearest_code(z, c, return_distance=True)

    compiled = torch.compile(step, fullgraph=True, dynamic=True, backend="aot_eager")
    for n in (5, 9):
        z, c = gauss(n, 11, 4, n)
        ids, found = compiled(z, c.requires_grad_())
        found.sum().backward()
        assert torch.equal(ids, step(z, c)[0])
        assert c.grad is not None

    class Module(torch.nn.Module):
        def forward(self, z: Tensor, c: Tensor) -> Tensor:
            return kernels.nearest_code(z, c)

    z, c = gauss(8, 11, 4)
    rows = torch.export.Dim("rows", min=2)
    program = torch.export.export(Module(), (z, c), dynamic_shapes=({0: rows}, None))
    assert torch.equal(program.module()(z[:5], c), step(z[:5], c)[0])


def test_autocast_does_not_round(path: str) -> None:
    z, c = gauss(50, 400, 8)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        ids = kernels.nearest_code(z, c)
    assert wrong(ids, z, c) == 0


def test_modes() -> None:
    with pytest.raises(ValueError, match="mode: expected one of"), kernels.use_kernels("fast"):
        pass
    with kernels.use_kernels("reference"):
        assert kernels.describe()["path"] == "reference"
    assert kernels.describe()["mode"] == _ops.default_mode()


def test_dtensor_is_refused() -> None:
    class Sharded(torch.Tensor):
        def full_tensor(self) -> Tensor:
            return self

    z, c = gauss(4, 5, 3)
    with pytest.raises(ValueError, match="codebook: expected a plain tensor"):
        kernels.nearest_code(z, c.as_subclass(Sharded))
