"""The CUDA library: found and loaded when the first CUDA tensor arrives, called through its C interface.

All memory comes from torch's allocator and all work goes to torch's current stream of the tensors' device; nothing here
waits for the device.
"""

import contextlib
import ctypes
import functools
import importlib.metadata
import os
from pathlib import Path

import torch
from torch import Tensor

from tokenizers_mm._check import fail, require

NAME = "libtokenizers_mm_cuda.so"
ABI_VERSION = 1
DTYPES = {torch.float32: 0, torch.float64: 1, torch.float16: 2, torch.bfloat16: 3}
PASSES = {"auto": 0, "portable": 1, "hopper": 2, "exact": 3}


class Matrix(ctypes.Structure):
    """`tmm_cuda_matrix` of csrc/cuda_nearest.h."""

    _fields_ = [
        ("device", ctypes.c_void_p),
        ("rows", ctypes.c_int64),
        ("cols", ctypes.c_int64),
        ("row_stride", ctypes.c_int64),
        ("col_stride", ctypes.c_int64),
        ("dtype", ctypes.c_int32),
    ]


class UnavailableError(RuntimeError):
    """The library cannot be used; the text says why and what to do."""


def matrix(tensor: Tensor) -> Matrix:
    """Describe a matrix of any strides; the tensor must outlive its use."""
    require(tensor.ndim == 2 and tensor.dtype in DTYPES, "tensor", "a float matrix", tensor)
    return Matrix(tensor.data_ptr(), *tensor.shape, *tensor.stride(), DTYPES[tensor.dtype])


def matrices(tensors: tuple[Tensor, ...]) -> ctypes.Array:
    """The array of matrices that the C interface takes for one or two parts."""
    return (Matrix * len(tensors))(*map(matrix, tensors))


def find_library() -> Path | None:
    """The file that TOKENIZERS_MM_CUDA_LIBRARY names, or the library beside this file or in the installed package."""
    if named := os.environ.get("TOKENIZERS_MM_CUDA_LIBRARY"):
        return Path(named)
    places = [Path(__file__).with_name(NAME)]
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        package = importlib.metadata.distribution("tokenizers_mm")
        places.append(Path(str(package.locate_file(Path("tokenizers_mm", "kernels", NAME)))))
    return next((place for place in places if place.is_file()), None)


@functools.cache
def load_library() -> ctypes.CDLL:
    """Load the library, or raise `UnavailableError`."""
    path = find_library()
    if path is None:
        raise UnavailableError(f"{NAME} was not built: install again with nvcc (CUDA 12.4 or later) on PATH")
    try:
        library = ctypes.CDLL(str(path))
    except OSError as error:
        raise UnavailableError(f"{path} does not load: {error}") from error
    number, pointer, size = ctypes.c_int, ctypes.c_void_p, ctypes.c_int64
    signatures = {
        "tmm_cuda_abi_version": (number, []),
        "tmm_cuda_error_string": (ctypes.c_char_p, [number]),
        "tmm_cuda_packed_bytes": (size, [size, size]),
        "tmm_cuda_workspace_bytes": (size, [size, size, size]),
        "tmm_cuda_pack": (number, [pointer, pointer, number, pointer, number, pointer]),
        "tmm_cuda_nearest": (number, [pointer, pointer, pointer, number, *[pointer] * 4, number, number, pointer]),
        "tmm_cuda_code_sums": (number, [pointer, pointer, pointer, size, pointer, number, pointer]),
    }
    for name, (result, arguments) in signatures.items():
        function = getattr(library, name)
        function.restype, function.argtypes = result, arguments
    version = library.tmm_cuda_abi_version()
    if version != ABI_VERSION:
        raise UnavailableError(f"{path} has interface {version}, this package needs {ABI_VERSION}")
    return library


def why_unavailable(device: torch.device) -> str | None:
    """Why tensors of this device cannot use the library; None if they can."""
    try:
        load_library()
    except UnavailableError as error:
        return str(error)
    major, minor = torch.cuda.get_device_capability(device)
    return (
        None
        if major >= 8
        else f"{torch.cuda.get_device_name(device)} has compute capability {major}.{minor}, below 8.0"
    )


def nearest_code(z: Tensor, codebook: Tensor) -> tuple[Tensor, Tensor]:
    """Index of the nearest code and its squared distance, as `reference.nearest_code`, on CUDA."""
    return nearest_code_shared((z,), (codebook,), (1.0,))


def nearest_code_shared(
    zs: tuple[Tensor, ...], codebooks: tuple[Tensor, ...], weights: tuple[float, ...]
) -> tuple[Tensor, Tensor]:
    """argmin_k of sum_i weights[i] * ||zs[i] - codebooks[i][k]||^2 over one or two parts, and that distance.

    zs[i] [N, D_i] and codebooks[i] [K, D_i] of any float dtypes and strides on one CUDA device, weights >= 0;
    returns int64 [N] and float64 [N]. Environment TOKENIZERS_MM_CUDA_PASS pins one of `PASSES`.
    """
    require(1 <= len(zs) <= 2 and len(zs) == len(codebooks) == len(weights), "zs", "one or two parts", len(zs))
    device, rows, num_codes = zs[0].device, zs[0].shape[0], codebooks[0].shape[0]
    for z, codebook in zip(zs, codebooks, strict=True):
        require(z.device == device and codebook.device == device, "codebook", f"on {device}", str(codebook.device))
        require(codebook.ndim == 2 and codebook.shape[0] == num_codes, "codebook", f"[{num_codes}, D]", codebook)
        require(z.ndim == 2 and z.shape == (rows, codebook.shape[1]), "z", f"[{rows}, {codebook.shape[1]}]", z)
    pass_name = os.environ.get("TOKENIZERS_MM_CUDA_PASS", "auto")
    if pass_name not in PASSES:
        fail("TOKENIZERS_MM_CUDA_PASS", f"one of {', '.join(PASSES)}", pass_name)
    library = load_library()
    dim = sum(codebook.shape[1] for codebook in codebooks)
    tokens, codes = matrices(zs), matrices(codebooks)
    scales = (ctypes.c_double * len(weights))(*weights)
    ids = torch.empty(rows, dtype=torch.int64, device=device)
    distances = torch.empty(rows, dtype=torch.float64, device=device)
    packed = _scratch(library.tmm_cuda_packed_bytes(num_codes, dim), device)
    workspace = _scratch(library.tmm_cuda_workspace_bytes(rows, num_codes, dim), device)
    stream = torch.cuda.current_stream(device).cuda_stream
    _check(library, library.tmm_cuda_pack(codes, scales, len(zs), packed.data_ptr(), device.index, stream))
    _check(
        library,
        library.tmm_cuda_nearest(
            tokens,
            codes,
            scales,
            len(zs),
            packed.data_ptr(),
            workspace.data_ptr(),
            ids.data_ptr(),
            distances.data_ptr(),
            PASSES[pass_name],
            device.index,
            stream,
        ),
    )
    return ids, distances


def code_sums(vectors: Tensor, ids: Tensor, num_codes: int) -> tuple[Tensor, Tensor]:
    """Counts int64 [K] and vector sums float64 [K, D] per code, as `reference.code_sums`, on CUDA and without a wait.

    Every sum is added in the order of the rows: the same bits on every run.
    """
    require(vectors.ndim == 2 and ids.shape == vectors.shape[:1], "ids", f"int64 [{vectors.shape[0]}]", ids)
    library = load_library()
    device = vectors.device
    by_code, order = torch.sort(ids, stable=True)
    begin = torch.searchsorted(by_code, torch.arange(num_codes + 1, device=device))
    sums = torch.empty((num_codes, vectors.shape[1]), dtype=torch.float64, device=device)
    stream = torch.cuda.current_stream(device).cuda_stream
    rows = ctypes.byref(matrix(vectors))
    _check(
        library,
        library.tmm_cuda_code_sums(
            rows, order.data_ptr(), begin.data_ptr(), num_codes, sums.data_ptr(), device.index, stream
        ),
    )
    return begin.diff(), sums


def _scratch(size: int, device: torch.device) -> Tensor:
    return torch.empty(size, dtype=torch.uint8, device=device)


def _check(library: ctypes.CDLL, code: int) -> None:
    if code:
        raise RuntimeError(f"CUDA nearest code: {library.tmm_cuda_error_string(code).decode()}")
