"""The kernels as torch operators: registration, fake kernels, gradients, the choice between native code and torch."""

import contextvars
import os
from collections.abc import Callable, Iterator
from types import ModuleType

import torch
from torch import Tensor

from tokenizers_mm._check import require, require_finite
from tokenizers_mm.kernels import _cuda, _native, reference
from tokenizers_mm.kernels._packed import Answer, Cache, PackedCodebook, content_of, joint_rows, plain_rows

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


def _search_twin(
    z: Tensor, codebook: Tensor, margins: bool, trust_version: bool
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Ids, squared distances and margins by the twin. The id of a row that is not finite is -1, without a wait for the
    device: it is refused where ids are read on the host (ImageCodes)."""
    if _twin(z.device) is _cuda:
        return _cuda.search((z,), (codebook,), (1.0,), margins, trust_version)
    if margins:
        return reference.nearest_code_margin(z, codebook)
    return *reference.nearest_code(z, codebook), None


def content(tensor: Tensor) -> tuple | None:
    """Dtype, shape and 128 bits of a digest of what a tensor holds now; None where no library reads its memory."""
    library = _library(tensor.device)
    return None if library is None else content_of(library, tensor.detach().contiguous())


def common_dtype(tensors: tuple[Tensor, ...]) -> torch.dtype:
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
    dtype = torch.float32 if z.dtype == codebook.dtype == torch.float32 else common_dtype((z, codebook))
    shape = z.shape[:-1]
    if library is None:
        ids, distance, margin = _search_twin(z.reshape(-1, z.shape[-1]), codebook, "m" in want, trust_version)
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
    """The check that the native library does by itself, for answers of plain torch on a CPU."""
    if ids.device.type == "cpu" and (bool((ids < 0).any()) or not all(bool(c.isfinite().all()) for c in codebooks)):
        _refuse(codebooks, codebook_names, zs, names)


def _refuse(
    codebooks: tuple[Tensor, ...], codebook_names: tuple[str, ...], zs: tuple[Tensor, ...], names: tuple[str, ...]
) -> None:
    """Raise the error that names the tensor with NaN or infinity in it, and the first place."""
    for codebook, name in zip(codebooks, codebook_names, strict=True):
        require_finite(name, "codes", codebook)
    for z, name in zip(zs, names, strict=True):
        require_finite(name, "features", z)
    raise RuntimeError("nearest_code: expected codes and features that nobody writes to during the call")


def nearest_ids(z: Tensor, codebook: Tensor, trust_version: bool = False, name: str = "z") -> Tensor:
    return _nearest(z, codebook, "", trust_version, name).ids


def nearest_distance(
    z: Tensor, codebook: Tensor, trust_version: bool = False, name: str = "z"
) -> tuple[Tensor, Tensor]:
    answer = _nearest(z, codebook, "d", trust_version, name)
    assert answer.distance is not None
    return answer.distance, answer.ids


def nearest_margin(
    z: Tensor, codebook: Tensor, trust_version: bool = False, name: str = "z"
) -> tuple[Tensor, Tensor, Tensor]:
    answer = _nearest(z, codebook, "dm", trust_version, name)
    assert answer.distance is not None
    assert answer.margin is not None
    return answer.distance, answer.margin, answer.ids


def nearest_shared(
    zs: list[Tensor],
    codebooks: list[Tensor],
    weights: list[float],
    normalize: bool,
    trust_version: bool = False,
    names: list[str] | None = None,
) -> Tensor:
    return _shared(zs, codebooks, weights, normalize, "", trust_version, names).ids


def shared_margin(
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
    dtype = common_dtype(parts + codes) if exact else torch.float64
    result = common_dtype(parts + codes)
    shape = parts[0].shape[:-1]
    width = sum(part.shape[-1] for part in parts)
    rows = [part.reshape(-1, part.shape[-1]) for part in parts]
    step = max(1, COPY_ELEMENTS // width)

    def joint_codebook() -> Tensor:
        return joint_rows(codes, scale, normalize, dtype)

    def blocks() -> Iterator[Tensor]:
        for start in range(0, rows[0].shape[0], step):
            yield joint_rows(tuple(row[start : start + step] for row in rows), scale, normalize, dtype)

    device = parts[0].device
    library = _library(device)
    if library is None:
        if len(rows) <= 2 and _twin(device) is _cuda:
            ids, _, margin = _cuda.nearest_shared(tuple(rows), codes, scale, normalize, bool(want), trust_version)
            return Answer(ids.view(shape), None, None if margin is None else margin.to(result).view(shape))
        joint = joint_codebook()  # nobody else can write to it
        found = [_search_twin(block, joint, bool(want), True) for block in blocks()]
        found = found or [_search_twin(parts[0].new_empty(0, width), joint, bool(want), True)]
        ids = torch.cat([part[0] for part in found])
        margin = torch.cat([part[2] for part in found if part[2] is not None]).to(result).view(shape) if want else None
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


def finite_ids(z: Tensor, ids: Tensor, name: str) -> Tensor:
    if z.device.type == "cpu":
        require_finite(name, "features", z)
        return ids.clone()
    return torch.where(z.isfinite().all(-1), ids, -1)


def code_sums(vectors: Tensor, ids: Tensor, num_codes: int) -> tuple[Tensor, Tensor]:
    library = _library(vectors.device)
    if library is None:
        twin = _twin(vectors.device)
        # The CUDA library reports a bad id later: looking at the ids here would wait for the device.
        if twin is reference and ids.numel() and not 0 <= int(ids.min()) <= int(ids.max()) < num_codes:
            _bad_ids(num_codes)
        counts, sums = twin.code_sums(vectors, ids, num_codes)
        return sums, counts
    rows = vectors.to(common_dtype((vectors,))).contiguous()
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


def ssim(x: Tensor, y: Tensor, line: Tensor, c1: float, c2: float, offset: float = 0.0) -> tuple[Tensor, Tensor]:
    """Both means of planes [..., H, W], float64 [...]; x and y of one shape, with a window inside."""
    require(bool((line == line.flip(0)).all()), "line", "symmetric weights", line.tolist())
    library = _library(x.device)
    shape, planes = x.shape[:-2], (-1, *x.shape[-2:])
    if library is None:
        if mode.get() == "native":
            raise _native.NativeUnavailableError(f"there is no native ssim for {x.device.type} tensors")
        whole, contrast = reference.ssim(x.reshape(planes), y.reshape(planes), line, c1, c2, offset)
        return whole.view(shape), contrast.view(shape)
    dtype = common_dtype((x, y))
    x, y, weights = x.to(dtype).contiguous(), y.to(dtype).contiguous(), line.to("cpu", torch.float64).contiguous()
    whole = torch.empty(shape, dtype=torch.float64)
    contrast = torch.empty_like(whole)
    status = library.ssim(
        x.data_ptr(),
        y.data_ptr(),
        _native.dtype_code(x),
        whole.numel(),
        x.shape[-2],
        x.shape[-1],
        weights.data_ptr(),
        len(weights),
        c1,
        c2,
        offset,
        whole.data_ptr(),
        contrast.data_ptr(),
        torch.get_num_threads(),
    )
    _native.check(status, "ssim")
    return whole, contrast


def _bad_ids(num_codes: int) -> None:
    raise ValueError(f"ids: expected values in 0 .. {num_codes - 1}, got one outside")


def may_be_differentiated(*tensors: Tensor) -> bool:
    """True if any kind of derivative may be taken with respect to these tensors, a transform of torch.func included.

    The operators have no formulas of their own: where this is true, their values are joined with a differentiable
    expression of the same value, which serves every mode and order of differentiation.
    """
    return (
        torch.compiler.is_compiling()
        or any(tensor.requires_grad for tensor in tensors)
        or torch.autograd.forward_ad._current_level >= 0
        or torch._C._are_functorch_transforms_active()
    )
