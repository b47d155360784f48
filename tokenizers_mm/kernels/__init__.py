"""Operations that also exist in C++ and CUDA. Each is exact, and none of them holds an N x K matrix."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal, TypeAlias, overload

import torch
from torch import Tensor

from tokenizers_mm._check import fail, require
from tokenizers_mm.kernels import _cuda, _native, _ops

__all__ = ["code_sums", "describe", "invalidate", "nearest_code", "nearest_code_shared", "use_kernels"]

_nearest = torch.ops.tokenizers_mm.nearest_code.default
_nearest_distance = torch.ops.tokenizers_mm.nearest_code_distance.default
_nearest_shared = torch.ops.tokenizers_mm.nearest_code_shared.default
_code_sums = torch.ops.tokenizers_mm.code_sums.default
Parts: TypeAlias = tuple[Tensor, ...] | list[Tensor]
Weights: TypeAlias = tuple[float, ...]

_PLAIN = (Tensor, torch.nn.Parameter)
_FLOATS = frozenset({torch.float16, torch.bfloat16, torch.float32, torch.float64})


@overload
def nearest_code(z: Tensor, codebook: Tensor, *, return_distance: Literal[False] = False) -> Tensor: ...


@overload
def nearest_code(z: Tensor, codebook: Tensor, *, return_distance: Literal[True]) -> tuple[Tensor, Tensor]: ...


def nearest_code(z: Tensor, codebook: Tensor, *, return_distance: bool = False) -> Tensor | tuple[Tensor, Tensor]:
    """Index of the nearest code: argmin_k ||z - codebook[k]||^2, exactly that of float64, the lowest index on ties.

    z [..., D] and codebook [K, D], any strides, float16, bfloat16, float32 or float64 in any mixture, taken as given
    (no autocast). Returns int64 [...]; with `return_distance` also the squared distance [...] (float64 if an input is,
    else float32), differentiable in z and codebook. A code that holds NaN or infinity is never chosen; a query without
    a finite distance gets index 0 and a NaN distance. Raises ValueError for wrong shapes or dtypes.
    """
    _check_pair("z", z, "codebook", codebook)
    if not return_distance:
        return _nearest(z, codebook)
    distance, ids = _nearest_distance(z, codebook)
    return ids, distance


@overload
def nearest_code_shared(
    zs: Parts,
    codebooks: Parts,
    weights: Weights = ...,
    *,
    normalize: bool = ...,
    return_distance: Literal[False] = False,
) -> Tensor: ...


@overload
def nearest_code_shared(
    zs: Parts, codebooks: Parts, weights: Weights = ..., *, normalize: bool = ..., return_distance: Literal[True]
) -> tuple[Tensor, Tensor]: ...


def nearest_code_shared(
    zs: Parts,
    codebooks: Parts,
    weights: Weights = (1.0, 1.0),
    *,
    normalize: bool = False,
    return_distance: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """One index for several codebooks: argmin_k of sum_i weights[i] * ||zs[i] - codebooks[i][k]||^2, int64 [...].

    zs[i] is [..., D_i] and codebooks[i] is [K, D_i]; weights are >= 0. `normalize` first divides every row of each part
    by its L2 norm (at least 1e-12), in float64. With `return_distance` also the joint distance [...], differentiable;
    it takes the memory of the looked up rows. Exactness and special values as in `nearest_code`. Source: TokenFlow
    (arXiv 2412.03069), equation 2.
    """
    count = len(codebooks)
    require(count > 0 and len(zs) == count and len(weights) == count, "zs", f"{count} parts and weights", str(len(zs)))
    for i, (z, codebook) in enumerate(zip(zs, codebooks, strict=True)):
        _check_pair(f"zs[{i}]", z, f"codebooks[{i}]", codebook)
        require(z.shape[:-1] == zs[0].shape[:-1], f"zs[{i}]", f"{list(zs[0].shape[:-1])} rows", z)
        require(codebook.shape[0] == codebooks[0].shape[0], f"codebooks[{i}]", f"[{len(codebooks[0])}, D]", codebook)
    require(all(weight >= 0 for weight in weights), "weights", ">= 0", weights)
    ids = _nearest_shared(list(zs), list(codebooks), [float(weight) for weight in weights], normalize)
    if not return_distance:
        return ids
    wide = torch.float64 if any(t.dtype == torch.float64 for t in (*zs, *codebooks)) else torch.float32
    distance = torch.zeros(ids.shape, dtype=wide, device=ids.device)
    for z, codebook, weight in zip(zs, codebooks, weights, strict=True):
        query, chosen = z.to(wide), codebook[ids].to(wide)
        if normalize:
            query, chosen = torch.nn.functional.normalize(query, dim=-1), torch.nn.functional.normalize(chosen, dim=-1)
        distance = distance + weight * (query - chosen).square().sum(-1)
    return ids, distance


def code_sums(vectors: Tensor, ids: Tensor, num_codes: int) -> tuple[Tensor, Tensor]:
    """How often each code was used, int64 [K], and the sum of the vectors given to it, float64 [K, D].

    vectors [N, D], ids int64 [N] in 0 .. K - 1. Rows are added in their order in float64: the same bits on every run
    and for any number of threads. Differentiable in vectors. Raises ValueError for wrong shapes and ids out of range.
    """
    require(vectors.ndim == 2 and vectors.dtype in _FLOATS, "vectors", "float [N, D]", vectors)
    require(ids.dtype == torch.int64 and ids.shape == vectors.shape[:1], "ids", f"int64 [{vectors.shape[0]}]", ids)
    require(num_codes > 0, "num_codes", ">= 1", num_codes)
    sums, counts = _code_sums(vectors, ids, num_codes)
    return counts, sums


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
    """Forget every packed codebook. Needed only after writing to a codebook through `.data` or a foreign pointer."""
    _ops.cache.clear()
    _cuda.packs.clear()


def describe() -> dict[str, str]:
    """Which code is live and why: mode, path ("native" or "reference"), isa, isa_cap, library, reason.

    `isa` is the instruction set of the native CPU code: the strongest one of this CPU that is not above `isa_cap`. The
    environment variable TOKENIZERS_MM_ISA sets the cap: portable, avx2, avx_vnni or avx512_vnni (as without it).
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
