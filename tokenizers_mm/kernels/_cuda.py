"""The CUDA library: found and loaded when the first CUDA tensor arrives, called through its C interface.

All memory comes from torch's allocator and all work goes to torch's current stream of the tensors' device; nothing here
waits for the device. Packed codebooks are kept on the device, and what kernels notice is written to pinned memory that
the host reads when it next comes by (`Faults`).
"""

import contextlib
import ctypes
import functools
import importlib.metadata
import os
import threading
from collections import OrderedDict
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from tokenizers_mm._check import fail, require
from tokenizers_mm.kernels._packed import joint_rows

NAME = "libtokenizers_mm_cuda.so"
ABI_VERSION = 2
DTYPES = {torch.float32: 0, torch.float64: 1, torch.float16: 2, torch.bfloat16: 3}
PASSES = {"auto": 0, "portable": 1, "hopper": 2, "exact": 3}
MAX_PACKS = 16
MAX_PACK_BYTES = 1 << 30
NORMALIZED_ELEMENTS = 1 << 23
FEW_ROWS, LARGE_CODEBOOK = 4, 1 << 22
"""Up to so many rows, and from so many values of a codebook on, every code is scored in double precision: that reads
the codes once, where packing reads them three times."""


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
        "tmm_cuda_nearest": (
            number,
            [*[pointer] * 3, number, pointer, number, *[pointer] * 5, number, number, pointer],
        ),
        "tmm_cuda_code_sums": (number, [pointer, pointer, pointer, size, pointer, pointer, number, pointer]),
    }
    for name, (result, arguments) in signatures.items():
        function = getattr(library, name)
        function.restype, function.argtypes = result, arguments
    version = library.tmm_cuda_abi_version()
    if version != ABI_VERSION:
        raise UnavailableError(f"{path} has interface {version}, this package needs {ABI_VERSION}")
    return library


@functools.cache
def _too_old(device: torch.device) -> str | None:
    major, minor = torch.cuda.get_device_capability(device)
    name = torch.cuda.get_device_name(device)
    return None if major >= 8 else f"{name} has compute capability {major}.{minor}, below 8.0"


def why_unavailable(device: torch.device) -> str | None:
    """Reason why tensors of this device cannot use the library; None if they can."""
    try:
        load_library()
    except UnavailableError as error:
        return str(error)
    return _too_old(device)


class Faults:
    """Rows of `tmm_cuda_faults` (csrc/cuda_nearest.h) in pinned memory: written by kernels, read without a wait.

    Every packed codebook has a row. Row 0 serves calls whose codebook is not kept.
    """

    def __init__(self, rows: int = 4 * MAX_PACKS):
        self.memory = torch.zeros((rows, 2), dtype=torch.int32, pin_memory=torch.cuda.is_available())
        self._words = (ctypes.c_int32 * (2 * rows)).from_address(self.memory.data_ptr())
        self._next = 0

    def take_row(self) -> int:
        """A row for a new packed codebook, in turn; whoever had it before is long gone, or packs once too often."""
        self._next = self._next % (len(self._words) // 2 - 1) + 1
        self._words[2 * self._next] = 0
        return self._next

    def address(self, row: int) -> int:
        """Pointer to the row, for kernels and the host."""
        return self.memory.data_ptr() + 8 * row

    def stale(self, row: int) -> bool:
        """True if a finished search found that the codebook of this row was not the packed one."""
        return self._words[2 * row] != 0

    def take_bad_ids(self) -> bool:
        """True if a finished call of code_sums, which reports to row 0, met an id that is no code; then forgets it."""
        seen = self._words[1] != 0
        self._words[1] = 0
        return seen


@functools.cache
def faults() -> Faults:
    """The faults of this process."""
    return Faults()


def raise_reported() -> None:
    """Raise ValueError for a fault of the caller that an earlier call, without a right answer, met on the device."""
    if faults().take_bad_ids():
        fail("ids", "values in 0 .. num_codes - 1 in every call of code_sums", "one outside, in an earlier call")


@dataclass
class Pack:
    """A packed codebook on the device: the buffer, the stream and event of its packing, its row in `faults`."""

    buffer: Tensor
    stream: int
    ready: torch.cuda.Event | None
    row: int
    shared: bool = False
    """True if another stream has used it."""


@dataclass
class _Entry:
    pack: Pack
    storages: list[StorageWeakRef]
    versions: list[int]
    trusted: bool  # not so: the codebook changes behind torch's back and is packed at every call


class Packs:
    """Packed codebooks by the memory and the version of what they were made from.

    A change that torch knows (an optimizer step, a copy in place) makes an entry stale by its version. Any other
    (through `.data`, a foreign pointer) is noticed on the device, by a hash of the codes: that search scores every code
    in double precision, so its answer is right, and reports it; from then on the codebook is packed at every call.
    """

    def __init__(self):
        self._entries: OrderedDict[tuple, _Entry] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, codebooks: tuple[Tensor, ...], weights: tuple[float, ...]) -> tuple[Pack, bool]:
        """The packed form of these codebooks, made if need be, and whether it has to be checked against them."""
        device = codebooks[0].device
        if any(codebook.is_inference() for codebook in codebooks) or _is_capturing(device):
            # No version to go by; or a graph, whose replays see codes that nobody compares versions of.
            return _pack(codebooks, weights, _scratch(_packed_bytes(codebooks), device), 0), False
        size, stream = _packed_bytes(codebooks), _place(device)[1]
        key = (weights, *map(_identity, codebooks))
        versions = [codebook._version for codebook in codebooks]
        with self._lock:
            entry = self._entries.get(key)
            trusted = entry is None or (entry.trusted and not faults().stale(entry.pack.row))
            if entry is not None and trusted and entry.versions == versions:
                self._entries.move_to_end(key)
                return _ready(entry.pack, device), True
            buffer = self._take_spare(key, size, device, stream)
        if buffer is None:
            buffer = _lasting(size, device)
        pack = _pack(codebooks, weights, buffer, faults().take_row())
        storages = [StorageWeakRef(codebook.untyped_storage()) for codebook in codebooks]
        with self._lock:
            self._entries[key] = _Entry(pack, storages, versions, trusted)
            self._entries.move_to_end(key)
            self._trim()
        return pack, False

    def clear(self) -> None:
        with self._lock:
            self._entries.clear()

    def __len__(self) -> int:
        return len(self._entries)

    def _take_spare(self, key: tuple, size: int, device: torch.device, stream: int) -> Tensor | None:
        """The buffer of a pack that nobody will ask for again, if no other stream may still be reading it."""
        for other, entry in self._entries.items():
            pack = entry.pack
            gone = other == key or any(storage.expired() for storage in entry.storages)
            fits = (pack.stream, pack.buffer.device, pack.buffer.nbytes) == (stream, device, size)
            if gone and fits and not pack.shared:
                del self._entries[other]
                return pack.buffer
        return None

    def _trim(self) -> None:
        for key in [k for k, entry in self._entries.items() if any(s.expired() for s in entry.storages)]:
            del self._entries[key]
        sizes = [entry.pack.buffer.nbytes for entry in self._entries.values()]
        while len(sizes) > MAX_PACKS or (len(sizes) > 1 and sum(sizes) > MAX_PACK_BYTES):
            self._entries.popitem(last=False)
            sizes.pop(0)


packs = Packs()


def _identity(codebook: Tensor) -> tuple:
    storage = codebook.untyped_storage()._cdata
    return storage, codebook.data_ptr(), codebook.shape, codebook.stride(), codebook.dtype


def _packed_bytes(codebooks: tuple[Tensor, ...]) -> int:
    dim = sum(codebook.shape[1] for codebook in codebooks)
    return load_library().tmm_cuda_packed_bytes(codebooks[0].shape[0], dim)


def _pack(codebooks: tuple[Tensor, ...], weights: tuple[float, ...], buffer: Tensor, row: int) -> Pack:
    library, device = load_library(), codebooks[0].device
    place = _place(device)
    scales = (ctypes.c_double * len(weights))(*weights)
    _check(library, library.tmm_cuda_pack(matrices(codebooks), scales, len(codebooks), buffer.data_ptr(), *place))
    return Pack(buffer, place[1], _record(device) if row else None, row)


def _ready(pack: Pack, device: torch.device) -> Pack:
    """The pack, safe to use on the current stream."""
    if _place(device)[1] != pack.stream:
        pack.shared = True
        _share(pack.buffer, device)
        if pack.ready is not None:
            torch.cuda.current_stream(device).wait_event(pack.ready)
    return pack


# Functions that differ where a test runs the library on the host (the device type is then "cpu").


def _place(device: torch.device) -> tuple[int, int]:
    """Index of the device and handle of its current stream."""
    return (device.index, torch.cuda.current_stream(device).cuda_stream) if device.type == "cuda" else (0, 0)


def _is_capturing(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def _record(device: torch.device) -> torch.cuda.Event | None:
    if device.type != "cuda":
        return None
    event = torch.cuda.Event()
    event.record(torch.cuda.current_stream(device))
    return event


def _share(buffer: Tensor, device: torch.device) -> None:
    """Tell the allocator that the current stream uses the buffer."""
    if device.type == "cuda":
        buffer.record_stream(torch.cuda.current_stream(device))


@functools.cache
def _own_stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)


def _lasting(size: int, device: torch.device) -> Tensor:
    """Memory that outlives the call. It must not come from the pool of a CUDA graph that torch.compile is warming up,
    where only known tensors may live. Such pools take the allocations of a thread or of a stream, so these are made by
    another thread for another stream.
    """
    if device.type != "cuda":
        return _scratch(size, device)

    def make() -> Tensor:
        with torch.cuda.stream(_own_stream(device)):
            return _scratch(size, device)

    with ThreadPoolExecutor(1) as other:
        buffer = other.submit(make).result()
    _share(buffer, device)
    return buffer


def nearest_code(z: Tensor, codebook: Tensor) -> tuple[Tensor, Tensor]:
    """Index of the nearest code and its squared distance, as `reference.nearest_code`, on CUDA."""
    ids, distances, _ = search((z,), (codebook,), (1.0,))
    return ids, distances


def nearest_shared(
    zs: tuple[Tensor, ...],
    codebooks: tuple[Tensor, ...],
    weights: tuple[float, ...],
    normalize: bool,
    margin: bool = False,
    trust_version: bool = False,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """As `search`; `normalize` first divides every row of each part by its L2 norm (`joint_rows`).

    The normalised codes are made and packed once, the normalised queries in blocks of 8 million values.
    """
    if not normalize:
        return search(zs, codebooks, weights, margin, trust_version)

    def unit(part: Tensor) -> Tensor:
        return joint_rows((part,), (1.0,), True, torch.float64)

    codes = tuple(map(unit, codebooks))
    step = max(1, NORMALIZED_ELEMENTS // sum(z.shape[1] for z in zs))
    blocks = zip(*(z.split(step) for z in zs), strict=True)
    found = [search(tuple(map(unit, block)), codes, weights, margin, trust_version=True) for block in blocks]
    margins = torch.cat([part[2] for part in found if part[2] is not None]) if margin else None
    return torch.cat([part[0] for part in found]), torch.cat([part[1] for part in found]), margins


def search(
    zs: tuple[Tensor, ...],
    codebooks: tuple[Tensor, ...],
    weights: tuple[float, ...],
    margin: bool = False,
    trust_version: bool = False,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """argmin_k of sum_i weights[i] * ||zs[i] - codebooks[i][k]||^2 over one or two parts, that distance, the margin.

    zs[i] [N, D_i] and codebooks[i] [K, D_i] of any float dtypes and strides on one CUDA device, weights >= 0;
    returns int64 [N], float64 [N] and, with `margin`, float64 [N]: how much farther (not squared) the nearest code is
    that differs from the chosen one in some value, infinity if none does. The id of a query with NaN or infinity is -1.
    trust_version: do not read the codebook where its version counter says that it is the packed one.
    Environment TOKENIZERS_MM_CUDA_PASS pins one of `PASSES`.
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
    ids = torch.empty(rows, dtype=torch.int64, device=device)
    distances = torch.empty(rows, dtype=torch.float64, device=device)
    margins = torch.empty_like(distances) if margin else None
    if rows == 0:
        return ids, distances, margins
    library = load_library()
    dim = sum(codebook.shape[1] for codebook in codebooks)
    if pass_name == "auto" and rows <= FEW_ROWS and num_codes * dim >= LARGE_CODEBOOK:
        pass_name, pack, check = "exact", None, False
    else:
        pack, check = packs.get(codebooks, weights)
    workspace = _scratch(library.tmm_cuda_workspace_bytes(rows, num_codes, dim), device)
    _check(
        library,
        library.tmm_cuda_nearest(
            matrices(zs),
            matrices(codebooks),
            (ctypes.c_double * len(weights))(*weights),
            len(zs),
            None if pack is None else pack.buffer.data_ptr(),
            check and not trust_version,
            workspace.data_ptr(),
            ids.data_ptr(),
            distances.data_ptr(),
            None if margins is None else margins.data_ptr(),
            faults().address(0 if pack is None else pack.row),
            PASSES[pass_name],
            *_place(device),
        ),
    )
    return ids, distances, margins


def code_sums(vectors: Tensor, ids: Tensor, num_codes: int) -> tuple[Tensor, Tensor]:
    """Counts int64 [K] and vector sums float64 [K, D] per code, as `reference.code_sums`, on CUDA and without a wait.

    Every sum is added in the order of the rows: the same bits on every run. An id outside 0 .. num_codes - 1 counts for
    no code; `raise_reported` tells of it once the device is done.
    """
    require(vectors.ndim == 2 and ids.shape == vectors.shape[:1], "ids", f"int64 [{vectors.shape[0]}]", ids)
    library, device = load_library(), vectors.device
    by_code, order = torch.sort(ids, stable=True)
    begin = torch.searchsorted(by_code, torch.arange(num_codes + 1, device=device))
    sums = torch.empty((num_codes, vectors.shape[1]), dtype=torch.float64, device=device)
    rows = ctypes.byref(matrix(vectors))
    pointers = order.data_ptr(), begin.data_ptr(), num_codes, sums.data_ptr(), faults().address(0)
    _check(library, library.tmm_cuda_code_sums(rows, *pointers, *_place(device)))
    return begin.diff(), sums


def _scratch(size: int, device: torch.device) -> Tensor:
    return torch.empty(size, dtype=torch.uint8, device=device)


def _check(library: ctypes.CDLL, code: int) -> None:
    if code:
        raise RuntimeError(f"CUDA nearest code: {library.tmm_cuda_error_string(code).decode()}")
