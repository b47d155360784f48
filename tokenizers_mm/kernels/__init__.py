"""Operations that also exist in C++ and CUDA. Each is exact, and none of them holds an N x K matrix."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Literal, TypeAlias, overload

import torch
from torch import Tensor

from tokenizers_mm._check import fail, require
from tokenizers_mm.kernels import _cuda, _native, _ops, _register  # noqa: F401 (defines torch.ops.tokenizers_mm)
from tokenizers_mm.kernels._kmeans import KMeans, kmeans
from tokenizers_mm.kernels.decisions import decided, watched

__all__ = [
    "KMeans",
    "code_sums",
    "describe",
    "finite_ids",
    "invalidate",
    "kmeans",
    "nearest_code",
    "nearest_code_shared",
    "ssim",
    "use_kernels",
]

_nearest = torch.ops.tokenizers_mm.nearest_code.default
_nearest_distance = torch.ops.tokenizers_mm.nearest_code_distance.default
_nearest_margin = torch.ops.tokenizers_mm.nearest_code_margin.default
_nearest_shared_margin = torch.ops.tokenizers_mm.nearest_code_shared_margin.default
_finite_ids = torch.ops.tokenizers_mm.finite_ids.default
_nearest_shared = torch.ops.tokenizers_mm.nearest_code_shared.default
_code_sums = torch.ops.tokenizers_mm.code_sums.default
_ssim = torch.ops.tokenizers_mm.ssim.default
Parts: TypeAlias = tuple[Tensor, ...] | list[Tensor]
Weights: TypeAlias = tuple[float, ...]

_PLAIN = (Tensor, torch.nn.Parameter)
_FLOATS = frozenset({torch.float16, torch.bfloat16, torch.float32, torch.float64})


@overload
def nearest_code(
    z: Tensor,
    codebook: Tensor,
    *,
    return_distance: Literal[False] = False,
    return_margin: Literal[False] = False,
    trust_version: bool = ...,
    name: str = ...,
) -> Tensor: ...


@overload
def nearest_code(
    z: Tensor,
    codebook: Tensor,
    *,
    return_distance: bool = ...,
    return_margin: bool = ...,
    trust_version: bool = ...,
    name: str = ...,
) -> Any: ...


def nearest_code(
    z: Tensor,
    codebook: Tensor,
    *,
    return_distance: bool = False,
    return_margin: bool = False,
    trust_version: bool = False,
    name: str = "z",
) -> Tensor | tuple[Tensor, ...]:
    """Index of the nearest code: argmin_k ||z - codebook[k]||^2, exactly that of float64, the lowest index on ties.

    z [..., D] and codebook [K, D], any strides, float16, bfloat16, float32 or float64 in any mixture, taken as given
    (no autocast).
    return_distance: also the squared distance [...], differentiable in z and codebook.
    return_margin: also the margin [...]: d2 - d1, where d1 is the distance (not squared) of the nearest code and d2
    that of the nearest code with another value; infinity where all codes are equal. The id stays the same for any
    change of z with a norm below margin / 2. Not differentiable.
    trust_version: skip reading the codebook while its version counter stands still since a call with this argument.
    Only for codebooks that nobody writes through `.data`, foreign pointers or other processes; without it, such
    writes are noticed.
    name: what errors call z.

    Returns: int64 [...], or a tuple of it and what was asked for, distance first; these are float64 if an input is,
    else float32.
    Raises: ValueError for wrong shapes or dtypes, and for NaN or infinity in z or codebook. On CUDA nothing is read
    back, so there the index of a row that is not finite is -1 instead, and a code that is not is never chosen.
    """
    _check_pair(name, z, "codebook", codebook)
    margin = None
    if return_margin or watched():
        distance, margin, ids = _nearest_margin(z.detach(), codebook.detach(), trust_version, name)
        decided(ids, margin)
    elif return_distance:
        distance, ids = _nearest_distance(z.detach(), codebook.detach(), trust_version, name)
    else:
        return _nearest(z, codebook, trust_version, name)
    if not return_margin:
        margin = None
    if not return_distance:
        return ids if margin is None else (ids, margin)
    if _ops.may_be_differentiated(z, codebook):
        gap = z.to(distance.dtype) - _rows(codebook, ids).to(distance.dtype)
        distance = _with_derivative(distance, gap.square().sum(-1))
    return (ids, distance) if margin is None else (ids, distance, margin)


@overload
def nearest_code_shared(
    zs: Parts,
    codebooks: Parts,
    weights: Weights = ...,
    *,
    normalize: bool = ...,
    return_distance: Literal[False] = False,
    return_margin: Literal[False] = False,
    trust_version: bool = ...,
    names: tuple[str, ...] | None = ...,
) -> Tensor: ...


@overload
def nearest_code_shared(
    zs: Parts,
    codebooks: Parts,
    weights: Weights = ...,
    *,
    normalize: bool = ...,
    return_distance: bool = ...,
    return_margin: bool = ...,
    trust_version: bool = ...,
    names: tuple[str, ...] | None = ...,
) -> Any: ...


def nearest_code_shared(
    zs: Parts,
    codebooks: Parts,
    weights: Weights = (1.0, 1.0),
    *,
    normalize: bool = False,
    return_distance: bool = False,
    return_margin: bool = False,
    trust_version: bool = False,
    names: tuple[str, ...] | None = None,
) -> Tensor | tuple[Tensor, ...]:
    """One index for several codebooks: argmin_k of sum_i weights[i] * ||zs[i] - codebooks[i][k]||^2, int64 [...].

    zs[i] is [..., D_i] and codebooks[i] is [K, D_i]; weights are >= 0. `normalize` first divides every row of each part
    by its L2 norm (at least 1e-12), in float64. `return_distance` adds the joint distance [...], differentiable; it
    takes the memory of the looked up rows. `return_margin` adds the margin between the square roots of joint distances.
    `names` are what errors call the zs. All else as in `nearest_code`. Source: TokenFlow (arXiv 2412.03069), eq. 2.
    """
    count = len(codebooks)
    require(count > 0 and len(zs) == count and len(weights) == count, "zs", f"{count} parts and weights", str(len(zs)))
    labels = [f"zs[{i}]" for i in range(count)] if names is None else list(names)
    for i, (z, codebook) in enumerate(zip(zs, codebooks, strict=True)):
        _check_pair(labels[i], z, f"codebooks[{i}]", codebook)
        require(z.shape[:-1] == zs[0].shape[:-1], labels[i], f"{list(zs[0].shape[:-1])} rows", z)
        require(codebook.shape[0] == codebooks[0].shape[0], f"codebooks[{i}]", f"[{len(codebooks[0])}, D]", codebook)
    require(all(weight >= 0 for weight in weights), "weights", ">= 0", weights)
    arguments = (list(zs), list(codebooks), [float(weight) for weight in weights], normalize, trust_version, labels)
    margin = None
    if return_margin or watched():
        margin, ids = _nearest_shared_margin(*arguments)
        decided(ids, margin)
        margin = margin if return_margin else None
    else:
        ids = _nearest_shared(*arguments)
    if not return_distance:
        return ids if margin is None else (ids, margin)
    wide = torch.float64 if any(t.dtype == torch.float64 for t in (*zs, *codebooks)) else torch.float32
    distance = torch.zeros(ids.shape, dtype=wide, device=ids.device)
    for z, codebook, weight in zip(zs, codebooks, weights, strict=True):
        query, chosen = z.to(wide), _rows(codebook, ids).to(wide)
        if normalize:
            query, chosen = torch.nn.functional.normalize(query, dim=-1), torch.nn.functional.normalize(chosen, dim=-1)
        distance = distance + weight * (query - chosen).square().sum(-1)
    return (ids, distance) if margin is None else (ids, distance, margin)


def finite_ids(
    z: Tensor,
    ids: Tensor,
    name: str = "z",
    margin: Callable[[], Tensor] | None = None,
    also: tuple[str, Tensor] | None = None,
) -> Tensor:
    """ids [...] int64 for features z [..., D] that were turned into ids without a search.

    also: a name and a tensor [..., C], computed with weights on the way from z to the ids, which is judged after z.
    margin: computes margins [...], as those of `nearest_code`: the ids stay the same for any change of z with a norm
    below margin / 2. Called only inside of `decisions.watch_decisions`.
    Raises ValueError when z or that tensor holds NaN or infinity; on CUDA, where nothing is read back, such ids become
    -1.
    """
    require(ids.dtype == torch.int64 and ids.shape == z.shape[:-1], "ids", f"int64 {list(z.shape[:-1])}", ids)
    decided(ids, margin)
    ids = _finite_ids(z, ids, name)
    return ids if also is None else _finite_ids(also[1], ids, also[0])


def code_sums(vectors: Tensor, ids: Tensor, num_codes: int) -> tuple[Tensor, Tensor]:
    """Number of times each code was used, int64 [K], and the sum of the vectors given to it, float64 [K, D].

    vectors [N, D], ids int64 [N] in 0 .. K - 1. Rows are added in their order in float64: the same bits on every run
    and for any number of threads. Differentiable in vectors. Raises ValueError for wrong shapes and ids out of range.
    """
    require(vectors.ndim == 2 and vectors.dtype in _FLOATS, "vectors", "float [N, D]", vectors)
    require(ids.dtype == torch.int64 and ids.shape == vectors.shape[:1], "ids", f"int64 [{vectors.shape[0]}]", ids)
    require(num_codes > 0, "num_codes", ">= 1", num_codes)
    sums, counts = _code_sums(vectors.detach(), ids, num_codes)
    if _ops.may_be_differentiated(vectors):
        same = vectors.new_zeros(sums.shape, dtype=torch.float64).index_add(0, ids, vectors.double())
        sums = _with_derivative(sums, same)
    return counts, sums


def ssim(x: Tensor, y: Tensor, line: Tensor, c1: float, c2: float, offset: float = 0.0) -> tuple[Tensor, Tensor]:
    """Means over windows of SSIM and of its contrast-structure factor, float64 [...] each (Wang et al. 2004, eq. 13).

    x, y: planes of images, float [..., H, W], measured in float64, each by itself. line: weights of a window along one
    axis, float [k], symmetric, sum 1, k at most 64; only windows inside the planes count. c1, c2: the squared constants
    of the luminance and of the contrast, above 0. offset: is added to both planes. The same bits for any number of
    threads and planes. Not differentiable. Raises ValueError for wrong shapes and dtypes, and for a line that is not
    symmetric.
    """
    k = line.numel()
    require(line.ndim == 1 and 1 <= k <= 64 and line.dtype in _FLOATS, "line", "1 to 64 weights, float [k]", line)
    fits = x.ndim >= 2 and min(x.shape[-2:]) >= k and x.dtype in _FLOATS
    require(fits, "x", f"float [..., H, W], H and W >= {k}", x)
    require(y.shape == x.shape and y.dtype in _FLOATS, "y", f"float {list(x.shape)}", y)
    require(y.device == x.device, "y", f"on {x.device}, as x", str(y.device))
    require(c1 > 0 and c2 > 0, "c1, c2", "above 0", (c1, c2))
    return _ssim(x.detach(), y.detach(), line, c1, c2, offset)


@contextmanager
def use_kernels(mode: str) -> Iterator[None]:
    """Choose the code that runs inside the block: "native" (an error if there is none), "reference" (plain torch) or
    "auto" (native where it can). TOKENIZERS_MM_KERNELS sets the choice outside any block.
    """
    require(mode in _ops.MODES, "mode", f"one of {', '.join(_ops.MODES)}", mode)
    token = _ops.mode.set(mode)
    try:
        yield
    finally:
        _ops.mode.reset(token)


def invalidate() -> None:
    """Free every packed codebook. Never needed for right answers, unless a writer was hidden from `trust_version`."""
    _ops.cache.clear()
    _cuda.packs.clear()


def describe() -> dict[str, str]:
    """Tell which code is live and why: mode, path ("native" or "reference"), isa, isa_cap, library, reason.

    `isa` is the instruction set of the native CPU code: the strongest one of this CPU that is not above `isa_cap`. The
    environment variable TOKENIZERS_MM_ISA sets the cap: portable, avx2, avx_vnni, avx512_vnni or avx512_amx (as without
    it) on x86, portable, neon, neon_dot or neon_i8mm on ARM64.
    Raises ValueError when the variable holds another value.
    """
    mode, cap = _ops.mode.get(), _native.isa_cap()
    try:
        library = _native.cpu()
    except _native.NativeUnavailableError as error:
        return {"mode": mode, "path": "reference", "isa": "", "isa_cap": cap, "library": "", "reason": str(error)}
    path = "reference" if mode == "reference" else "native"
    reason = "asked for by use_kernels or TOKENIZERS_MM_KERNELS" if path == "reference" else "the library loaded"
    isa = {"isa": library.isa, "isa_cap": cap}
    return {"mode": mode, "path": path, **isa, "library": str(library.path), "reason": reason}


def _rows(codebook: Tensor, ids: Tensor) -> Tensor:
    """Rows of the codebook; any for the id -1 (see `nearest_code`, CUDA)."""
    return torch.nn.functional.embedding(ids.clamp_min(0), codebook)


def _with_derivative(exact: Tensor, same: Tensor) -> Tensor:
    """The value of `exact` with the derivatives of `same`, which has that value up to rounding."""
    return exact + (same - same.detach())


def _check_pair(z_name: str, z: Tensor, codebook_name: str, codebook: Tensor) -> None:
    shape = codebook.shape
    if len(shape) != 2 or shape[0] < 1 or shape[1] < 1 or codebook.dtype not in _FLOATS:
        fail(codebook_name, "float [K, D], K and D >= 1", codebook)
    if z.ndim < 1 or z.shape[-1] != shape[1] or z.dtype not in _FLOATS:
        fail(z_name, f"float [..., {shape[1]}]", z)
    if z.device != codebook.device:
        fail(z_name, f"on {codebook.device}, as {codebook_name}", str(z.device))
    if type(z) is Tensor and type(codebook) in _PLAIN:
        return
    for name, tensor in ((z_name, z), (codebook_name, codebook)):
        if hasattr(tensor, "full_tensor"):  # a DTensor
            fail(name, "a plain tensor (unshard it with full_tensor() first)", type(tensor).__name__)
