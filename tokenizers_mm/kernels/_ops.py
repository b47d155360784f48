"""The kernels as torch operators: registration, fake kernels, gradients, the choice between native code and torch."""

import contextvars
import os
from collections.abc import Iterator
from types import ModuleType

import torch
from torch import Tensor

from tokenizers_mm.kernels import _cuda, _native, reference
from tokenizers_mm.kernels._packed import Cache, PackedCodebook, joint_rows, plain_rows

MODES = ("auto", "native", "reference")
COPY_ELEMENTS = 1 << 20
"""Elements of z converted at a time (4 or 8 MB) where its rows cannot be read in place."""

cache = Cache()


def default_mode() -> str:
    """The mode that TOKENIZERS_MM_KERNELS asks for; auto without it."""
    name = os.environ.get("TOKENIZERS_MM_KERNELS", "auto")
    if name not in MODES:
        raise ValueError(f"TOKENIZERS_MM_KERNELS: expected one of {', '.join(MODES)}, got {name}")
    return name


_DEFAULT_MODE = default_mode()
mode: contextvars.ContextVar[str] = contextvars.ContextVar("tokenizers_mm_kernels", default=_DEFAULT_MODE)


def _library(device: torch.device) -> _native.CpuLibrary | None:
    """The CPU library to use for tensors on this device; None: the twin that `_twin` gives."""
    if device.type != "cpu" or mode.get() == "reference":
        return None
    return _native.cpu() if mode.get() == "native" else _native.cpu_or_none()


def _twin(device: torch.device) -> ModuleType:
    """The module with `nearest_code` and `code_sums` for tensors that the CPU library does not take: the CUDA library's
    or plain torch."""
    if device.type == "cuda" and mode.get() != "reference":
        reason = _cuda.why_unavailable(device)
        if reason is None:
            _cuda.raise_reported()
            return _cuda
    elif device.type == "cpu" or mode.get() != "native":
        return reference
    else:
        reason = f"there are no native kernels for {device.type} tensors"
    if mode.get() == "native":
        raise _native.NativeUnavailableError(reason)
    return reference


def _common_dtype(tensors: tuple[Tensor, ...]) -> torch.dtype:
    """float64 where any input is, else float32: both hold every value of the inputs."""
    return torch.float64 if any(tensor.dtype == torch.float64 for tensor in tensors) else torch.float32


def _row_blocks(z: Tensor, dtype: torch.dtype) -> Iterator[Tensor]:
    """z [..., D] as contiguous rows [n, D] of `dtype`, in order, copying no more than a block at a time."""
    if z.dtype == dtype and z.is_contiguous():
        yield z.view(-1, z.shape[-1])
        return
    if z.ndim > 2 and z.numel() // max(1, z.shape[0]) > COPY_ELEMENTS:
        for part in z:
            yield from _row_blocks(part, dtype)
        return
    step = max(1, COPY_ELEMENTS * max(1, z.shape[0]) // max(1, z.numel()))
    for start in range(0, z.shape[0], step):
        block = z[start : start + step].to(dtype)
        yield block.reshape(-1, z.shape[-1]).contiguous()


def _search_blocks(
    packed: PackedCodebook, codes: Tensor, blocks: Iterator[Tensor], ids: Tensor, distance: Tensor | None
) -> bool:
    flat = ids.view(-1)
    flat_distance = None if distance is None else distance.view(-1)
    start = 0
    for block in blocks:
        stop = start + block.shape[0]
        part = None if flat_distance is None else flat_distance[start:stop]
        if not packed.search(codes, block, flat[start:stop], part, torch.get_num_threads()):
            return False
        start = stop
    return True


def _nearest(z: Tensor, codebook: Tensor, want_distance: bool) -> tuple[Tensor, Tensor | None]:
    library = _library(z.device)
    dtype = torch.float32 if z.dtype == codebook.dtype == torch.float32 else _common_dtype((z, codebook))
    shape = z.shape[:-1]
    if library is None:
        ids, found = _twin(z.device).nearest_code(z.reshape(-1, z.shape[-1]), codebook)
        return ids.view(shape), found.to(dtype).view(shape) if want_distance else None
    ids = torch.empty(shape, dtype=torch.int64)
    distance = torch.empty(shape, dtype=dtype) if want_distance else None

    def make() -> PackedCodebook:
        return PackedCodebook(library, *plain_rows(codebook, dtype))

    packed = cache.get((codebook,), dtype, make)
    if z.dtype == dtype and z.is_contiguous():
        done = packed.search(codebook, z, ids, distance, torch.get_num_threads())
    else:
        done = _search_blocks(packed, codebook, _row_blocks(z, dtype), ids, distance)
    if not done:
        _search_blocks(_fresh(make), codebook, _row_blocks(z, dtype), ids, distance)
    return ids, distance


def _fresh(make) -> PackedCodebook:
    """After a search that found the codebook changed behind torch's back: forget everything packed, pack again."""
    cache.clear()
    return make()


def _nearest_ids(z: Tensor, codebook: Tensor) -> Tensor:
    return _nearest(z, codebook, False)[0]


def _nearest_distance(z: Tensor, codebook: Tensor) -> tuple[Tensor, Tensor]:
    ids, distance = _nearest(z, codebook, True)
    assert distance is not None
    return distance, ids


def _nearest_shared(zs: list[Tensor], codebooks: list[Tensor], weights: list[float], normalize: bool) -> Tensor:
    parts, codes = tuple(zs), tuple(codebooks)
    exact = not normalize and all(weight == 1 for weight in weights)
    dtype = _common_dtype(parts + codes) if exact else torch.float64
    scale = tuple(weights)

    def joint_codebook() -> Tensor:
        return joint_rows(codes, scale, normalize, dtype)

    shape = parts[0].shape[:-1]
    width = sum(part.shape[-1] for part in parts)
    rows = [part.reshape(-1, part.shape[-1]) for part in parts]
    step = max(1, COPY_ELEMENTS // width)

    def blocks() -> Iterator[Tensor]:
        for start in range(0, rows[0].shape[0], step):
            yield joint_rows(tuple(row[start : start + step] for row in rows), scale, normalize, dtype)

    library = _library(parts[0].device)
    if library is None:
        twin = _twin(parts[0].device)
        if twin is _cuda and len(parts) <= 2:
            return _cuda.nearest_shared(tuple(rows), codes, scale, normalize)[0].view(shape)
        joint = joint_codebook()
        found = [twin.nearest_code(block, joint)[0] for block in blocks()]
        return torch.cat(found).view(shape) if found else parts[0].new_empty(shape, dtype=torch.int64)
    ids = torch.empty(shape, dtype=torch.int64)

    def make() -> PackedCodebook:
        return PackedCodebook(library, joint_codebook(), copied=True)

    packed = cache.get(codes, (scale, normalize, dtype), make)
    _search_blocks(packed, codes[0], blocks(), ids, None)
    return ids


def _code_sums(vectors: Tensor, ids: Tensor, num_codes: int) -> tuple[Tensor, Tensor]:
    library = _library(vectors.device)
    if library is None:
        twin = _twin(vectors.device)
        # The CUDA library reports a bad id later: looking at the ids here would wait for the device.
        if twin is reference and ids.numel() and not 0 <= int(ids.min()) <= int(ids.max()) < num_codes:
            _bad_ids(num_codes)
        counts, sums = twin.code_sums(vectors, ids, num_codes)
        return sums, counts
    rows = vectors.to(_common_dtype((vectors,))).contiguous()
    ids = ids.contiguous()
    counts = torch.empty(num_codes, dtype=torch.int64)
    sums = torch.empty((num_codes, rows.shape[1]), dtype=torch.float64)
    status = library.code_sums(
        rows.data_ptr(),
        _native.dtype_code(rows),
        ids.data_ptr(),
        rows.shape[0],
        rows.shape[1],
        num_codes,
        counts.data_ptr(),
        sums.data_ptr(),
        torch.get_num_threads(),
    )
    if status == _native.BAD_ARGUMENT:
        _bad_ids(num_codes)
    _native.check(status, "code_sums")
    return sums, counts


def _bad_ids(num_codes: int) -> None:
    raise ValueError(f"ids: expected values in 0 .. {num_codes - 1}, got one outside")


_namespace = torch.library.Library("tokenizers_mm", "DEF")


def _define(schema: str, implementation, fake) -> None:
    name = "tokenizers_mm::" + schema.partition("(")[0]
    _namespace.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    _namespace.impl(name, implementation, "CompositeExplicitAutograd")
    torch.library.register_fake(name, fake, lib=_namespace)


def _fake_ids(z: Tensor, codebook: Tensor) -> Tensor:
    return z.new_empty(z.shape[:-1], dtype=torch.int64)


def _fake_distance(z: Tensor, codebook: Tensor) -> tuple[Tensor, Tensor]:
    ids = z.new_empty(z.shape[:-1], dtype=torch.int64)
    return z.new_empty(z.shape[:-1], dtype=_common_dtype((z, codebook))), ids


def _fake_shared(zs: list[Tensor], codebooks: list[Tensor], weights: list[float], normalize: bool) -> Tensor:
    return zs[0].new_empty(zs[0].shape[:-1], dtype=torch.int64)


def _fake_sums(vectors: Tensor, ids: Tensor, num_codes: int) -> tuple[Tensor, Tensor]:
    sums = vectors.new_empty((num_codes, vectors.shape[1]), dtype=torch.float64)
    return sums, ids.new_empty((num_codes,))


def _save_distance(ctx, inputs, output) -> None:
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*inputs, output[1])


def _distance_backward(ctx, grad: Tensor | None, _):
    """d |z - c|^2 = 2 (z - c) . (dz - dc); the codebook's part is summed in a fixed order."""
    if grad is None:
        return None, None
    z, codebook, ids = ctx.saved_tensors
    gap = 2 * grad[..., None] * (z.to(grad.dtype) - codebook[ids].to(grad.dtype))
    grad_codebook = None
    if ctx.needs_input_grad[1]:
        rows = gap.reshape(-1, gap.shape[-1])
        sums, _ = torch.ops.tokenizers_mm.code_sums(rows, ids.reshape(-1), codebook.shape[0])
        grad_codebook = -sums.to(codebook.dtype)
    return gap.to(z.dtype) if ctx.needs_input_grad[0] else None, grad_codebook


def _save_sums(ctx, inputs, output) -> None:
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(inputs[1])
    ctx.dtype = inputs[0].dtype


def _sums_backward(ctx, grad: Tensor | None, _):
    (ids,) = ctx.saved_tensors
    return None if grad is None else grad[ids].to(ctx.dtype), None, None


# A floating-point output comes first: with an int64 one there, torch's tracing of the gradient fails.
_define("nearest_code(Tensor z, Tensor codebook) -> Tensor", _nearest_ids, _fake_ids)
_define("nearest_code_distance(Tensor z, Tensor codebook) -> (Tensor, Tensor)", _nearest_distance, _fake_distance)
_define(
    "nearest_code_shared(Tensor[] zs, Tensor[] codebooks, float[] weights, bool normalize) -> Tensor",
    _nearest_shared,
    _fake_shared,
)
_define("code_sums(Tensor vectors, Tensor ids, SymInt num_codes) -> (Tensor, Tensor)", _code_sums, _fake_sums)
torch.library.register_autograd(
    "tokenizers_mm::nearest_code_distance", _distance_backward, setup_context=_save_distance, lib=_namespace
)
torch.library.register_autograd("tokenizers_mm::code_sums", _sums_backward, setup_context=_save_sums, lib=_namespace)
