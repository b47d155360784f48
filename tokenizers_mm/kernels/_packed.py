"""Codebooks packed for the native library, kept between calls by their content."""

import ctypes
import threading
from collections import OrderedDict
from collections.abc import Callable

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from tokenizers_mm.kernels import _native

MAX_ENTRIES = 16
MAX_ORPHANS = 2
MAX_BYTES = 1 << 30
COPY_ELEMENTS = 1 << 20
"""Elements converted at a time when a codebook has to be copied."""


class PackedCodebook:
    """A handle of the native library, and the copy of the codebook it needs where the codebook itself will not do."""

    def __init__(self, library: _native.CpuLibrary, rows: Tensor, copied: bool, method: int = 0):
        self._library = library
        self.copy = rows if copied else None
        self.dtype = rows.dtype
        self.handle = library.create(rows.shape[0], rows.shape[1], _native.dtype_code(rows), method)
        if not self.handle:
            raise _native.NativeUnavailableError(f"method: expected one for this codebook, got {method}")

    def __del__(self):
        if getattr(self, "handle", None):
            self._library.destroy(self.handle)

    @property
    def nbytes(self) -> int:
        copy = 0 if self.copy is None else self.copy.nbytes
        return self._library.bytes(self.handle) + copy

    @property
    def method(self) -> str:
        """Method of the last search: one of _native.METHODS ("auto": there was none)."""
        return _native.METHODS[self._library.method(self.handle)]

    def search(self, codes: Tensor, z: Tensor, answer: "Answer", threads: int) -> int:
        """Fill the answer, one value for each contiguous row of z; returns a status of the library."""
        return self._library.nearest_code(
            self.handle,
            (codes if self.copy is None else self.copy).data_ptr(),
            z.data_ptr(),
            answer.ids.numel(),
            answer.ids.data_ptr(),
            None if answer.distance is None else answer.distance.data_ptr(),
            None if answer.margin is None else answer.margin.data_ptr(),
            threads,
        )


class Answer:
    """Tensors that a search writes: ids int64, and distances and margins where they are wanted, all of one shape."""

    __slots__ = ("distance", "ids", "margin")

    def __init__(self, ids: Tensor, distance: Tensor | None, margin: Tensor | None):
        self.ids, self.distance, self.margin = ids, distance, margin

    def rows(self, start: int, stop: int) -> "Answer":
        """The part for the rows start .. stop - 1 of the flattened shape."""
        parts = (None if part is None else part.view(-1)[start:stop] for part in (self.ids, self.distance, self.margin))
        return Answer(*parts)  # type: ignore[arg-type]


class _Entry:
    __slots__ = ("owner", "packed", "storages", "versions")

    def __init__(self, packed: PackedCodebook):
        self.packed = packed
        self.owner: tuple | None = None
        self.storages: list[StorageWeakRef] = []
        self.versions: list[int] | None = None

    def orphaned(self) -> bool:
        return any(storage.expired() for storage in self.storages)


class Cache:
    """Packed codebooks by their content: dtypes, shapes and 128 bits of a digest of their memory.

    A pack is a function of that content, so it cannot be out of date: every call reads the codebook once, at the speed
    of memory, and finds the pack of what is there now, whoever wrote it and how. (Writing to it during a call is an
    error of the caller.) The tensors that used an entry last own it: when they hold other content, it goes; when they
    are gone, it is kept only while it is among the MAX_ORPHANS latest such entries, for codebooks that are computed
    anew with every call.
    """

    def __init__(self):
        self._entries: OrderedDict[tuple, _Entry] = OrderedDict()
        self._owned: dict[tuple, _Entry] = {}
        self._lock = threading.Lock()

    def renew_lock(self) -> None:
        """For a forked child: the thread that may hold the lock was not forked."""
        self._lock = threading.Lock()

    def get(
        self,
        library: _native.CpuLibrary,
        codebooks: tuple[Tensor, ...],
        extra: object,
        make: Callable[[], PackedCodebook],
        trust_version: bool,
    ) -> PackedCodebook:
        """The packed form of these tensors, made if need be. `extra` tells apart uses of the same tensors.

        trust_version: take the pack these very tensors used last while their version counters stand still.
        """
        owner = (extra, *map(_identity, codebooks))
        versions = None if any(c.is_inference() for c in codebooks) else [c._version for c in codebooks]
        if trust_version and versions is not None:
            entry = self._owned.get(owner)
            if entry is not None and entry.versions == versions:
                return entry.packed
        key = (extra, *(content_of(library, codebook) for codebook in codebooks))
        with self._lock:
            entry = self._entries.get(key)
            if entry is not None:
                self._entries.move_to_end(key)
                self._own(entry, owner, codebooks, versions)
                return entry.packed
        entry = _Entry(make())
        with self._lock:
            self._entries[key] = entry
            self._own(entry, owner, codebooks, versions)
            self._trim()
        return entry.packed

    def clear(self) -> None:
        with self._lock:
            self._entries.clear()
            self._owned.clear()

    def __len__(self) -> int:
        return len(self._entries)

    def _own(self, entry: _Entry, owner: tuple, codebooks: tuple[Tensor, ...], versions: list[int] | None) -> None:
        if entry.owner != owner:
            if entry.owner is not None:
                self._owned.pop(entry.owner, None)
            entry.owner = owner
            entry.storages = [StorageWeakRef(codebook.untyped_storage()) for codebook in codebooks]
        entry.versions = versions
        former = self._owned.get(owner)
        self._owned[owner] = entry
        if former is not None and former is not entry:  # its content is gone
            former.owner = None
            self._drop(former)

    def _drop(self, entry: _Entry) -> None:
        for key in [key for key, other in self._entries.items() if other is entry]:
            del self._entries[key]
        if entry.owner is not None and self._owned.get(entry.owner) is entry:
            del self._owned[entry.owner]

    def _trim(self) -> None:
        orphans = [entry for entry in self._entries.values() if entry.orphaned()]
        for entry in orphans[: max(0, len(orphans) - MAX_ORPHANS)]:
            self._drop(entry)
        while len(self._entries) > MAX_ENTRIES:
            self._drop(next(iter(self._entries.values())))
        total = sum(entry.packed.nbytes for entry in self._entries.values())
        while total > MAX_BYTES and len(self._entries) > 1:
            oldest = next(iter(self._entries.values()))
            total -= oldest.packed.nbytes
            self._drop(oldest)


def _identity(codebook: Tensor) -> tuple:
    return (
        codebook.untyped_storage()._cdata,
        codebook.data_ptr(),
        codebook.shape,
        codebook.stride(),
        codebook.dtype,
    )


def content_of(library: _native.CpuLibrary, codebook: Tensor) -> tuple:
    """Values that decide about a pack: dtype, shape and a digest of the memory."""
    size = codebook.element_size()
    if codebook.is_contiguous():
        rows, bytes_, stride = 1, codebook.numel() * size, 0
    elif codebook.stride(1) == 1:
        rows, bytes_, stride = codebook.shape[0], codebook.shape[1] * size, codebook.stride(0) * size
    else:
        return content_of(library, codebook.contiguous())
    digest = (ctypes.c_uint64 * 2)()
    _native.check(
        library.digest(codebook.data_ptr(), rows, bytes_, stride, digest, torch.get_num_threads()), "nearest_code"
    )
    return codebook.dtype, codebook.shape, digest[0], digest[1]


def plain_rows(codebook: Tensor, dtype: torch.dtype) -> tuple[Tensor, bool]:
    """The codebook as contiguous rows of `dtype`, and whether that took a copy."""
    if codebook.dtype == dtype and codebook.is_contiguous():
        return codebook, False
    return codebook.to(dtype, memory_format=torch.contiguous_format).contiguous(), True


def joint_rows(parts: tuple[Tensor, ...], weights: tuple[float, ...], normalize: bool, dtype: torch.dtype) -> Tensor:
    """Parts [N, D_i] side by side as [N, sum D_i] of `dtype`, each times sqrt(weight), so that plain distances of the
    result are the weighted joint distances. `normalize` first divides every part by its L2 norm (at least 1e-12).
    """
    rows = parts[0].shape[0]
    joint = torch.empty((rows, sum(part.shape[1] for part in parts)), dtype=dtype, device=parts[0].device)
    step = max(1, COPY_ELEMENTS // max(1, joint.shape[1]))
    for start in range(0, rows, step):
        column = 0
        for part, weight in zip(parts, weights, strict=True):
            value = part[start : start + step].to(dtype)
            if normalize:
                value = value / value.norm(dim=1, keepdim=True).clamp_min(1e-12)
            joint[start : start + step, column : column + part.shape[1]] = value if weight == 1 else value * weight**0.5
            column += part.shape[1]
    return joint
