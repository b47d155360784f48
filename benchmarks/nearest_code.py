"""nearest_code against torch.cdist, chunked addmm, torch.compile, FAISS and vector-quantize-pytorch.

    python -m benchmarks.nearest_code [--threads 1 2] [--grid G1 G5] [--data gauss] [--rows 256 2048] [--methods FAISS]
                                      [--rounds 5] [--isa avx2] [--clock cpu] [--quick] [--device cuda] [--record]

--isa caps the instruction set of ours and of the peers, so that one machine measures what weaker ones would see.
Ratios are times of a method over ours, all in one process and interleaved. "ours" packs the codebook inside the timed
call; "ours, packed" finds it in the cache; "ours, margin" does too and returns the margins. --methods "ours, avx2" is
"ours, packed" on a weaker instruction set than the others.
"""

import argparse
import sys
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks import harness
from tokenizers_mm import kernels
from tokenizers_mm.kernels import _native
from tokenizers_mm.kernels._packed import Answer, PackedCodebook

GRID = {
    "G1": (16384, 8192, 32),
    "G2": (65536, 16384, 8),
    "G2x": (8192, 262144, 8),
    "G3": (4096, 32768, 800),
    "G4": (16384, 262144, 256),
    "G5": (65536, 1024, 64),
    "V1": (4096, 8192, 32),
    "V2": (16384, 1024, 64),
    "V3": (1024, 32768, 800),
}
DATA = ("gauss", "clus_n", "aniso")
WORST = (
    "log-normal norms",
    "clumped at the mean",
    "far clump",
    "every code twice",
    "all identical",
    "scaled dimensions",
)
MAX_TABLE_BYTES = 3 << 30
"""Peers that hold an N x K table of float32 larger than this are skipped."""


def make(kind: str, n: int, k: int, d: int) -> tuple[Tensor, Tensor]:
    """Tokens [n, d] and codes [k, d] of one law; the same on every run."""
    g = torch.Generator().manual_seed(0)
    z, c = torch.randn(n, d, generator=g), torch.randn(k, d, generator=g)
    if kind == "clus_n":  # tokens near codes, at half the distance between neighbouring codes; normalised
        c = F.normalize(c, dim=-1)
        near = torch.cdist(c[:256], c).topk(2, largest=False).values[:, 1].median()
        z = F.normalize(c[torch.randint(0, k, (n,), generator=g)] + 0.5 * near * z / d**0.5, dim=-1)
    elif kind == "aniso":  # power-law spectrum, rotated, a few strong dimensions, a common offset
        rotation = torch.linalg.qr(torch.randn(d, d, generator=g))[0]
        spectrum = torch.arange(1, d + 1).float() ** -0.7
        strong = torch.where(torch.arange(d) % 37 == 0, 5.0, 1.0)
        offset = 2 * torch.randn(d, generator=g)
        z, c = ((x * spectrum) @ rotation * strong + offset for x in (z, c))
    elif kind == "log-normal norms":
        c = c * torch.exp(2 * torch.randn(k, 1, generator=g))
    elif kind == "clumped at the mean":
        c[: 9 * k // 10] *= 1e-3
    elif kind == "far clump":
        c[: k // 2] = 1e3 + torch.randn(k // 2, d, generator=g)
    elif kind == "every code twice":
        c[k // 2 :] = c[: k // 2]
    elif kind == "all identical":
        c = c[:1].repeat(k, 1)
    elif kind == "scaled dimensions":
        scale = torch.exp(1.5 * torch.randn(d, generator=g))
        z, c = z * scale, c * scale
    elif kind == "gauss_n":
        z, c = F.normalize(z, dim=-1), F.normalize(c, dim=-1)
    return z.contiguous(), c.contiguous()


def ours(z: Tensor, c: Tensor) -> Tensor:
    kernels.invalidate()
    return kernels.nearest_code(z, c)


def ours_float32(z: Tensor, c: Tensor) -> Tensor:
    """Our own fused float32 pass, the yardstick for bad codebooks."""
    return search(PackedCodebook(_native.cpu(), c, False, _native.METHODS.index("float32")), z, c)


def search(packed: PackedCodebook, z: Tensor, c: Tensor) -> Tensor:
    ids = torch.empty(len(z), dtype=torch.int64)
    packed.search(c, z, Answer(ids, None, None), torch.get_num_threads())
    return ids


def packed_for(isa: str, c: Tensor) -> PackedCodebook:
    """The codebook packed for a weaker instruction set than the one in use."""
    library = _native.cpu()
    now = library.isa
    library.select_isa(isa)
    packed = PackedCodebook(library, c, False)
    library.select_isa(now)
    return packed


def ours_layer(z: Tensor, c: Tensor) -> Tensor:
    """Forward pass of a quantizer: search, look up, commitment loss."""
    quantized = F.embedding(ours(z, c), c)
    F.mse_loss(quantized, z)
    return quantized


def cdist(z: Tensor, c: Tensor) -> Tensor:
    return torch.cdist(z, c).argmin(1)


def addmm(z: Tensor, c: Tensor) -> Tensor:
    return torch.addmm(c.square().sum(1), z, c.T, alpha=-2).argmin(1)


def chunked(table_bytes: int) -> Callable[[Tensor, Tensor], Tensor]:
    """A search by a part of the tokens at a time, whose table of distances takes this many bytes."""

    def search(z: Tensor, c: Tensor) -> Tensor:
        norms, codes = c.square().sum(1), c.T
        parts = z.split(max(1, table_bytes // (z.element_size() * len(c))))
        return torch.cat([torch.addmm(norms, part, codes, alpha=-2).argmin(1) for part in parts])

    return search


def peers(z: Tensor, c: Tensor, quick: bool) -> tuple[dict[str, Callable[[], Any]], list[str]]:
    """Methods that can run here, and notes on those that cannot."""
    n, k = len(z), len(c)
    methods: dict[str, Callable[[], Any]] = {}
    notes = []
    candidates = {f"chunked addmm {size} MB": chunked(size << 20) for size in (4, 64)}
    for name, search in candidates.items():
        methods[name] = lambda search=search: search(z, c)
    if 4 * n * k <= MAX_TABLE_BYTES:
        methods["cdist+argmin"] = lambda: cdist(z, c)
        if not quick:
            compiled = torch.compile(addmm)
            methods["torch.compile"] = lambda: compiled(z, c)
    else:
        notes.append(
            f"cdist, torch.compile and vector-quantize-pytorch skipped: their table takes {4e-9 * n * k:.0f} GB"
        )
    if z.device.type == "cpu":
        _add_faiss(methods, notes, z, c)
    if 16 * n * k < 1 << 30:  # it holds four such tables and more
        _add_vector_quantize(methods, notes, z, c)
    return methods, notes


def _add_faiss(methods: dict[str, Callable[[], Any]], notes: list[str], z: Tensor, c: Tensor) -> None:
    try:
        import faiss
    except ImportError:
        notes.append("FAISS is not installed")
        return
    faiss.omp_set_num_threads(torch.get_num_threads())
    rows, codes = z.numpy(), c.numpy()
    methods["FAISS"] = lambda: faiss.knn(rows, codes, 1)


def _add_vector_quantize(methods: dict[str, Callable[[], Any]], notes: list[str], z: Tensor, c: Tensor) -> None:
    try:
        from vector_quantize_pytorch import VectorQuantize
    except ImportError:
        notes.append("vector-quantize-pytorch is not installed")
        return
    layer = VectorQuantize(dim=c.shape[1], codebook_size=c.shape[0]).to(z.device).eval()
    layer.codebook = c
    batch = z[None]
    methods["vector-quantize-pytorch"] = torch.no_grad()(lambda: layer(batch))
    methods["ours as a layer"] = torch.no_grad()(lambda: ours_layer(z, c))


def mismatches(z: Tensor, c: Tensor) -> int:
    """Rows of a sample whose index is not that of the float64 difference form: 128, fewer for large codebooks."""
    ids, wide, wrong = ours(z, c), c.double(), 0
    rows = min(len(z), 128, 1 + (1 << 30) // c.numel())
    for row in torch.linspace(0, len(z) - 1, rows).long().tolist():
        table = (z[row].double() - wide).square().sum(1)
        wrong += int(table[ids[row]] > table.min() * (1 + 1e-12))
    return wrong


def measure(case: str, kind: str, rows: int | None, threads: int, options: argparse.Namespace) -> dict[str, Any]:
    n, k, d = GRID[case]
    n = min(n, rows or n, n // 16 if options.quick else n)
    z, c = (tensor.to(options.device) for tensor in make(kind, n, k, d))
    torch.set_num_threads(threads)
    methods: dict[str, Callable[[], Any]] = {
        "ours": lambda: ours(z, c),
        "ours, packed": lambda: kernels.nearest_code(z, c),
        "ours, margin": lambda: kernels.nearest_code(z, c, return_margin=True),
    }
    if options.device == "cpu" and _native.cpu_or_none() is not None:
        methods["ours float32"] = lambda: ours_float32(z, c)
    for isa in _native.ISAS:
        if f"ours, {isa}" in (options.methods or ()):
            methods[f"ours, {isa}"] = partial(search, packed_for(isa, c), z, c)
    notes: list[str] = []
    if kind not in WORST:
        others, notes = peers(z, c, options.quick)
        methods |= others
    if options.methods:
        methods = {name: method for name, method in methods.items() if name == "ours" or name in options.methods}
    memory = {name: harness.peak_extra_megabytes(method, options.device) for name, method in methods.items()}
    times = harness.interleave(methods, options.rounds, options.device, options.clock)
    wrong = mismatches(z, c)
    base = times["ours"]
    table = [["", "ms", "time / ours", "peak extra MB"]]
    for name, value in sorted(times.items(), key=lambda item: item[1]):
        table.append([name, f"{value:.2f}", f"{value / base:.2f}", f"{memory[name] or 0:.1f}"])
    isa = kernels.describe()["isa"]
    print(f"\n{case} N={n} K={k} D={d} {kind}, {isa}, {threads} thread(s), {wrong} mismatches\n{harness.table(table)}")
    print("\n".join(f"note: {note}" for note in notes), end="\n" if notes else "", flush=True)
    return {"case": case, "n": n, "k": k, "d": d, "data": kind, "threads": threads, "device": options.device,
            "clock": options.clock,
            "milliseconds": times, "peak_extra_megabytes": memory, "mismatches": wrong, "notes": notes}  # fmt: skip


def main(arguments: Sequence[str] | None = None) -> None:
    parser = harness.parser(__doc__)
    parser.add_argument("--grid", nargs="+", choices=GRID, default=["G1", "G2", "G3", "G4", "G5"])
    parser.add_argument("--data", nargs="+", choices=(*DATA, "gauss_n", *WORST, "worst"), default=list(DATA))
    parser.add_argument("--threads", nargs="+", type=int, default=[1])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--rows", nargs="+", type=int, default=[None], help="at most this many tokens")
    parser.add_argument("--isa", choices=_native.ISAS, help="the strongest instruction set, of ours and of the peers")
    parser.add_argument("--methods", nargs="+", help="only these, beside ours")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--clock", choices=harness.CLOCKS, default="wall", help="cpu: for one thread on a busy machine")
    parser.add_argument("--quick", action="store_true", help="a sixteenth of the tokens, without torch.compile")
    options = parser.parse_args(arguments)
    if options.isa:
        harness.cap_isa(options.isa, "benchmarks.nearest_code", sys.argv[1:] if arguments is None else arguments)
    kinds = [kind for name in options.data for kind in (WORST if name == "worst" else (name,))]
    about = harness.machine(options.device)
    print(about, kernels.describe())
    for case in options.grid:
        for kind in kinds:
            for rows in options.rows:
                for threads in options.threads:
                    row = measure(case, kind, rows, threads, options)
                    if options.record:
                        harness.record("nearest_code", row, about)


if __name__ == "__main__":
    main()
