"""Codebooks packed for the native library, kept between calls while the codebook stays as it is."""

import threading
from collections import OrderedDict
from collections.abc import Callable

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from tokenizers_mm.kernels import _native

MAX_ENTRIES = 16
MAX_BYTES = 1 << 30
COPY_ELEMENTS = 1 << 20
"""Elements converted at a time when a codebook has to be copied."""


class PackedCodebook:
    """A handle of the native library, and the copy of the codebook it needs where the codebook itself will not do."""

    def __init__(self, library: _native.CpuLibrary, rows: Tensor, copied: bool, method: int = 0):
        self._library = library
        self.copy = rows if copied else None
        self.dtype = rows.dtype
        self._dtype_code = _native.dtype_code(rows)
        self.handle = library.create(rows.shape[0], rows.shape[1], self._dtype_code, method)
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
        """How the last search was done: one of _native.METHODS ("auto": none was)."""
        return _native.METHODS[self._library.method(self.handle)]

    def search(self, codes: Tensor, z: Tensor, ids: Tensor, distance: Tensor | None, threads: int) -> bool:
        """Fill ids (and distance), one for each contiguous row of z; False: the codebook is not the one packed."""
        status = self._library.nearest_code(
            self.handle,
            (codes if self.copy is None else self.copy).data_ptr(),
            z.data_ptr(),
            ids.numel(),
            ids.data_ptr(),
            None if distance is None else distance.data_ptr(),
            threads,
        )
        if status == _native.STALE:
            return False
        if status:
            _native.check(status, "nearest_code")
        return True


class _Entry:
    __slots__ = ("packed", "storages", "versions")

    def __init__(self, packed: PackedCodebook, storages: list[StorageWeakRef], versions: list[int]):
        self.packed, self.storages, self.versions = packed, storages, versions


class Cache:
    """Packed codebooks by the memory they came from.

    An entry belongs to a storage, held by a weak reference (which pins the storage's address, not its memory), and to a
    version of it: an optimizer step or any other change in place makes the entry stale. Writes through `.data` do not
    change the version; `clear` is for them.
    """

    def __init__(self):
        self._entries: OrderedDict[tuple, _Entry] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, codebooks: tuple[Tensor, ...], extra: object, make: Callable[[], PackedCodebook]) -> PackedCodebook:
        """The packed form of these tensors, made if need be. `extra` tells apart uses of the same tensors."""
        key, versions = [extra], []
        for codebook in codebooks:
            if codebook.is_inference():  # no version to go by
                return make()
            key.append(_identity(codebook))
            versions.append(codebook._version)
        key = tuple(key)
        with self._lock:
            entry = self._entries.get(key)
            if entry is not None and entry.versions == versions:
                self._entries.move_to_end(key)
                return entry.packed
        packed = make()
        storages = [StorageWeakRef(codebook.untyped_storage()) for codebook in codebooks]
        with self._lock:
            self._entries[key] = _Entry(packed, storages, versions)
            self._entries.move_to_end(key)
            self._trim()
        return packed

    def clear(self) -> None:
        with self._lock:
            self._entries.clear()

    def __len__(self) -> int:
        return len(self._entries)

    def _trim(self) -> None:
        for key in [k for k, entry in self._entries.items() if any(s.expired() for s in entry.storages)]:
            del self._entries[key]
        while len(self._entries) > MAX_ENTRIES:
            self._entries.popitem(last=False)
        total = sum(entry.packed.nbytes for entry in self._entries.values())
        while total > MAX_BYTES and len(self._entries) > 1:
            total -= self._entries.popitem(last=False)[1].packed.nbytes


def _identity(codebook: Tensor) -> tuple:
    return (
        codebook.untyped_storage()._cdata,
        codebook.data_ptr(),
        codebook.shape,
        codebook.stride(),
        codebook.dtype,
    )


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
