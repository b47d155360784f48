"""The kernels as torch operators: registration, fake kernels, gradients, the choice between native code and torch."""

import contextvars
import os
from collections.abc import Callable, Iterator
from types import ModuleType

import torch
from torch import Tensor

from tokenizers_mm._check import fail
from tokenizers_mm.kernels import _cuda, _native, reference
from tokenizers_mm.kernels._packed import Answer, Cache, PackedCodebook, joint_rows, plain_rows

MODES = ("auto", "native", "reference")
COPY_ELEMENTS = 1 << 20
"""Elements of z converted at a time (4 or 8 MB) where its rows cannot be read in place."""

LIVE_ROWS = 2
"""Rows up to which one pass over the codebook as it lies in memory costs no more than reading it to find its pack,"""

LIVE_DIM, LIVE_ELEMENTS = 9, 4096
"""from this many dimensions on or up to this many elements; otherwise the box tree is so fast that reading wins."""

cache = Cache()
os.register_at_fork(after_in_child=cache.renew_lock)


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


def _twin(device: torch.device, margins: bool = False) -> ModuleType:
    """The module with `nearest_code` and `code_sums` for tensors that the CPU library does not take: the CUDA library's
    (which has no margins) or plain torch."""
    if device.type == "cuda" and mode.get() != "reference" and not margins:
        reason = _cuda.why_unavailable(device)
        if reason is None:
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


def _search(
    library: _native.CpuLibrary,
    codebooks: tuple[Tensor, ...],
    extra: object,
    make: Callable[[], PackedCodebook],
    blocks: Iterator[Tensor],
    answer: Answer,
    trust_version: bool,
) -> None:
    """Search the pack of these codebooks for all blocks of rows."""
    packed = cache.get(library, codebooks, extra, make, trust_version)
    start = 0
    for block in blocks:
        stop = start + block.shape[0]
        part = answer if block.shape[0] == answer.ids.numel() else answer.rows(start, stop)
        status = packed.search(codebooks[0], block, part, torch.get_num_threads())
        if status:
            _native.check(status, "nearest_code")
        start = stop


def _empty(shape: torch.Size, dtype: torch.dtype, want: str) -> Answer:
    """Room for an answer; `want` has a d for distances and an m for margins."""
    return Answer(
        torch.empty(shape, dtype=torch.int64),
        torch.empty(shape, dtype=dtype) if "d" in want else None,
        torch.empty(shape, dtype=dtype) if "m" in want else None,
    )


def _nearest(z: Tensor, codebook: Tensor, want: str, trust_version: bool, name: str) -> Answer:
    library = _library(z.device)
    dtype = torch.float32 if z.dtype == codebook.dtype == torch.float32 else _common_dtype((z, codebook))
    shape = z.shape[:-1]
    if library is None:
        ids, distance, margin = _twin(z.device, "m" in want).nearest_code(
            z.reshape(-1, z.shape[-1]), codebook, "m" in want
        )
        answer = Answer(
            ids.view(shape),
            distance.to(dtype).view(shape) if "d" in want else None,
            None if margin is None else margin.to(dtype).view(shape),
        )
        _refuse_if_not_finite((codebook,), ("codebook",), answer.ids, (z,), (name,))
        return answer
    answer = _empty(shape, dtype, want)
    plain = z.dtype == dtype and z.is_contiguous()
    try:
        if plain and codebook.dtype == dtype and _prefers_live(answer.ids.numel(), codebook):
            _search_live(library, codebook, z, answer)
        else:
            blocks = iter((z.view(-1, z.shape[-1]),)) if plain else _row_blocks(z, dtype)
            _search(
                library,
                (codebook,),
                (dtype, codebook.is_contiguous()),  # a pack of rows used in place does not serve a copy of them
                lambda: PackedCodebook(library, *plain_rows(codebook, dtype)),
                blocks,
                answer,
                trust_version,
            )
    except _native.NotFiniteError:
        _refuse((codebook,), ("codebook",), (z,), (name,))
    return answer


def _prefers_live(rows: int, codebook: Tensor) -> bool:
    small = codebook.shape[1] >= LIVE_DIM or codebook.numel() <= LIVE_ELEMENTS
    return rows <= LIVE_ROWS and small and codebook.is_contiguous()


def _search_live(library: _native.CpuLibrary, codebook: Tensor, z: Tensor, answer: Answer) -> None:
    status = library.nearest_code_live(
        codebook.data_ptr(),
        codebook.shape[0],
        codebook.shape[1],
        _native.dtype_code(codebook),
        z.data_ptr(),
        answer.ids.numel(),
        answer.ids.data_ptr(),
        None if answer.distance is None else answer.distance.data_ptr(),
        None if answer.margin is None else answer.margin.data_ptr(),
        torch.get_num_threads(),
    )
    if status:
        _native.check(status, "nearest_code")


def _refuse_if_not_finite(
    codebooks: tuple[Tensor, ...],
    codebook_names: tuple[str, ...],
    ids: Tensor,
    zs: tuple[Tensor, ...],
    names: tuple[str, ...],
) -> None:
    """What the native library does by itself, for answers of the twins. On a device nothing is read back here, which
    would wait for it: there the id of a row that is not finite is -1, and whoever reads ids on the host (ImageCodes,
    for one) refuses it."""
    if ids.device.type == "cpu" and (bool((ids < 0).any()) or not all(bool(c.isfinite().all()) for c in codebooks)):
        _refuse(codebooks, codebook_names, zs, names)


def _refuse(codebooks, codebook_names, zs, names) -> None:
    """Raise the error that names the tensor with NaN or infinity in it, and the first place."""
    for what, tensors, labels in (("codes", codebooks, codebook_names), ("features", zs, names)):
        for tensor, label in zip(tensors, labels, strict=True):
            bad = (~tensor.isfinite()).nonzero()
            if len(bad):
                place = bad[0].tolist()
                fail(label, f"finite {what}", f"{'NaN' if tensor[tuple(place)].isnan() else 'infinity'} at {place}")
    raise AssertionError("expected NaN or infinity in the codebook or in the features")


def _nearest_ids(z: Tensor, codebook: Tensor, trust_version: bool = False, name: str = "z") -> Tensor:
    return _nearest(z, codebook, "", trust_version, name).ids


def _nearest_distance(
    z: Tensor, codebook: Tensor, trust_version: bool = False, name: str = "z"
) -> tuple[Tensor, Tensor]:
    answer = _nearest(z, codebook, "d", trust_version, name)
    assert answer.distance is not None
    return answer.distance, answer.ids


def _nearest_margin(
    z: Tensor, codebook: Tensor, trust_version: bool = False, name: str = "z"
) -> tuple[Tensor, Tensor, Tensor]:
    answer = _nearest(z, codebook, "dm", trust_version, name)
    assert answer.distance is not None
    assert answer.margin is not None
    return answer.distance, answer.margin, answer.ids


def _nearest_shared(
    zs: list[Tensor],
    codebooks: list[Tensor],
    weights: list[float],
    normalize: bool,
    trust_version: bool = False,
    names: list[str] | None = None,
) -> Tensor:
    return _shared(zs, codebooks, weights, normalize, "", trust_version, names).ids


def _shared_margin(
    zs: list[Tensor],
    codebooks: list[Tensor],
    weights: list[float],
    normalize: bool,
    trust_version: bool = False,
    names: list[str] | None = None,
) -> tuple[Tensor, Tensor]:
    answer = _shared(zs, codebooks, weights, normalize, "m", trust_version, names)
    assert answer.margin is not None
    return answer.margin, answer.ids


def _shared(
    zs: list[Tensor],
    codebooks: list[Tensor],
    weights: list[float],
    normalize: bool,
    want: str,
    trust_version: bool,
    names: list[str] | None,
) -> Answer:
    parts, codes, scale = tuple(zs), tuple(codebooks), tuple(weights)
    labels = tuple(names) if names else tuple(f"zs[{i}]" for i in range(len(parts)))
    code_labels = tuple(f"codebooks[{i}]" for i in range(len(codes)))
    exact = not normalize and all(weight == 1 for weight in weights)
    dtype = _common_dtype(parts + codes) if exact else torch.float64
    result = _common_dtype(parts + codes)
    shape = parts[0].shape[:-1]
    width = sum(part.shape[-1] for part in parts)
    rows = [part.reshape(-1, part.shape[-1]) for part in parts]
    step = max(1, COPY_ELEMENTS // width)

    def joint_codebook() -> Tensor:
        return joint_rows(codes, scale, normalize, dtype)

    def blocks() -> Iterator[Tensor]:
        for start in range(0, rows[0].shape[0], step):
            yield joint_rows(tuple(row[start : start + step] for row in rows), scale, normalize, dtype)

    library = _library(parts[0].device)
    if library is None:
        joint = joint_codebook()
        twin = _twin(joint.device, bool(want))
        found = [twin.nearest_code(block, joint, bool(want)) for block in blocks()]
        ids = torch.cat([part[0] for part in found]) if found else parts[0].new_empty(0, dtype=torch.int64)
        margin = None
        if want:
            margin = torch.cat([part[2] for part in found]) if found else parts[0].new_empty(0)
            margin = margin.to(result).view(shape)
        _refuse_if_not_finite(codes, code_labels, ids, parts, labels)
        return Answer(ids.view(shape), None, margin)
    answer = _empty(shape, dtype, want)
    extra = (scale, normalize, dtype)
    try:
        _search(
            library,
            codes,
            extra,
            lambda: PackedCodebook(library, joint_codebook(), copied=True),
            blocks(),
            answer,
            trust_version,
        )
    except _native.NotFiniteError:
        _refuse(codes, code_labels, parts, labels)
    return Answer(answer.ids, None, None if answer.margin is None else answer.margin.to(result))


def _finite_ids(z: Tensor, ids: Tensor, name: str) -> Tensor:
    bad = ~z.isfinite().all(-1)
    if z.device.type == "cpu":
        if bool(bad.any()):
            _refuse((), (), (z,), (name,))
        return ids.clone()
    return torch.where(bad, -1, ids)


def _code_sums(vectors: Tensor, ids: Tensor, num_codes: int) -> tuple[Tensor, Tensor]:
    library = _library(vectors.device)
    if library is None:
        if ids.numel() and not 0 <= int(ids.min()) <= int(ids.max()) < num_codes:
            _bad_ids(num_codes)
        counts, sums = _twin(vectors.device).code_sums(vectors, ids, num_codes)
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


def _fake_ids(z: Tensor, codebook: Tensor, trust_version: bool = False, name: str = "z") -> Tensor:
    return z.new_empty(z.shape[:-1], dtype=torch.int64)


def _fake_distance(z: Tensor, codebook: Tensor, trust_version: bool = False, name: str = "z") -> tuple[Tensor, Tensor]:
    ids = z.new_empty(z.shape[:-1], dtype=torch.int64)
    return z.new_empty(z.shape[:-1], dtype=_common_dtype((z, codebook))), ids


def _fake_margin(
    z: Tensor, codebook: Tensor, trust_version: bool = False, name: str = "z"
) -> tuple[Tensor, Tensor, Tensor]:
    distance, ids = _fake_distance(z, codebook)
    return distance, torch.empty_like(distance), ids


def _fake_shared(
    zs: list[Tensor],
    codebooks: list[Tensor],
    weights: list[float],
    normalize: bool,
    trust_version: bool = False,
    names: list[str] | None = None,
) -> Tensor:
    return zs[0].new_empty(zs[0].shape[:-1], dtype=torch.int64)


def _fake_shared_margin(
    zs: list[Tensor],
    codebooks: list[Tensor],
    weights: list[float],
    normalize: bool,
    trust_version: bool = False,
    names: list[str] | None = None,
) -> tuple[Tensor, Tensor]:
    ids = _fake_shared(zs, codebooks, weights, normalize)
    return zs[0].new_empty(ids.shape, dtype=_common_dtype((*zs, *codebooks))), ids


def _fake_finite_ids(z: Tensor, ids: Tensor, name: str) -> Tensor:
    return torch.empty_like(ids)


def _fake_sums(vectors: Tensor, ids: Tensor, num_codes: int) -> tuple[Tensor, Tensor]:
    sums = vectors.new_empty((num_codes, vectors.shape[1]), dtype=torch.float64)
    return sums, ids.new_empty((num_codes,))


def _save_distance(ctx, inputs, output) -> None:
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(*output[1:])
    ctx.save_for_backward(*inputs[:2], output[-1])


def _distance_backward(ctx, grad: Tensor | None, *_):
    """d |z - c|^2 = 2 (z - c) . (dz - dc); the codebook's part is summed in a fixed order."""
    no_grads = [None] * (len(ctx.needs_input_grad) - 2)
    if grad is None:
        return None, None, *no_grads
    z, codebook, ids = ctx.saved_tensors
    gap = 2 * grad[..., None] * (z.to(grad.dtype) - codebook[ids].to(grad.dtype))
    grad_codebook = None
    if ctx.needs_input_grad[1]:
        rows = gap.reshape(-1, gap.shape[-1])
        sums, _ = torch.ops.tokenizers_mm.code_sums(rows, ids.reshape(-1), codebook.shape[0])
        grad_codebook = -sums.to(codebook.dtype)
    return gap.to(z.dtype) if ctx.needs_input_grad[0] else None, grad_codebook, *no_grads


def _save_sums(ctx, inputs, output) -> None:
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(inputs[1])
    ctx.dtype = inputs[0].dtype


def _sums_backward(ctx, grad: Tensor | None, _):
    (ids,) = ctx.saved_tensors
    return None if grad is None else grad[ids].to(ctx.dtype), None, None


# A floating-point output comes first: with an int64 one there, torch's tracing of the gradient fails.
_PLAIN = "Tensor z, Tensor codebook, bool trust_version=False, str name='z'"
_SHARED = (
    "Tensor[] zs, Tensor[] codebooks, float[] weights, bool normalize, bool trust_version=False, str[]? names=None"
)
_define(f"nearest_code({_PLAIN}) -> Tensor", _nearest_ids, _fake_ids)
_define(f"nearest_code_distance({_PLAIN}) -> (Tensor, Tensor)", _nearest_distance, _fake_distance)
_define(f"nearest_code_margin({_PLAIN}) -> (Tensor, Tensor, Tensor)", _nearest_margin, _fake_margin)
_define(f"nearest_code_shared({_SHARED}) -> Tensor", _nearest_shared, _fake_shared)
_define(f"nearest_code_shared_margin({_SHARED}) -> (Tensor, Tensor)", _shared_margin, _fake_shared_margin)
_define("code_sums(Tensor vectors, Tensor ids, SymInt num_codes) -> (Tensor, Tensor)", _code_sums, _fake_sums)
_define("finite_ids(Tensor z, Tensor ids, str name) -> Tensor", _finite_ids, _fake_finite_ids)
for _name in ("nearest_code_distance", "nearest_code_margin"):
    torch.library.register_autograd(
        f"tokenizers_mm::{_name}", _distance_backward, setup_context=_save_distance, lib=_namespace
    )
torch.library.register_autograd("tokenizers_mm::code_sums", _sums_backward, setup_context=_save_sums, lib=_namespace)
