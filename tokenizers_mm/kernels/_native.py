"""The native library: where it is, how it is called, and why it is not there when it is not.

Nothing is loaded when this module is imported; the library is looked for at the first call that could use it.
"""

import ctypes
import functools
import importlib.metadata
import logging
import os
import platform
import sys
from pathlib import Path

from torch import Tensor

from tokenizers_mm._check import require

ABI_VERSION = 3
OK, NO_MEMORY, BAD_ARGUMENT, BAD_QUERY, BAD_CODES = range(5)
METHODS = ("auto", "int8", "int16", "float32", "difference", "tree", "brute")
ARM = platform.machine() in ("aarch64", "arm64")
ISAS = ("portable", *(("neon", "neon_dot", "neon_i8mm") if ARM else ("avx2", "avx_vnni", "avx512_vnni", "avx512_amx")))
"""Instruction sets with loops of their own, the weakest first. TOKENIZERS_MM_ISA names the strongest one to use."""

_log = logging.getLogger(__name__)


class NativeUnavailableError(RuntimeError):
    """The native library is not installed or cannot be loaded; the message says why and what to do."""


class NotFiniteError(ValueError):
    """A search met NaN or infinity, in its codes or its queries."""


def library_path(name: str) -> Path | None:
    """Path of the shared library `name`: beside this file, or where the installed distribution put it."""
    file = Path(f"lib{name}.dylib" if sys.platform == "darwin" else f"lib{name}.so")
    beside = Path(__file__).with_name(file.name)
    if beside.exists():
        return beside
    try:
        installed = Path(
            str(importlib.metadata.distribution("tokenizers_mm").locate_file(Path("tokenizers_mm/kernels") / file))
        )
    except importlib.metadata.PackageNotFoundError:
        return None
    return installed if installed.exists() else None


class CpuLibrary:
    """The C functions of csrc/tokenizers_mm.h."""

    def __init__(self, path: Path):
        self.path = path
        library = ctypes.CDLL(str(path))
        pointer, size, number = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int
        library.tmm_isa.restype = ctypes.c_char_p
        library.tmm_select_isa.argtypes = [ctypes.c_char_p]
        self.create = _function(library.tmm_codebook_create, pointer, size, size, number, number)
        self.destroy = _function(library.tmm_codebook_destroy, None, pointer)
        self.bytes = _function(library.tmm_codebook_bytes, size, pointer)
        self.method = _function(library.tmm_codebook_method, number, pointer)
        self.nearest_code = _function(library.tmm_nearest_code, number, *[pointer] * 3, size, *[pointer] * 3, number)
        self.nearest_code_live = _function(
            library.tmm_nearest_code_live, number, pointer, size, size, number, pointer, size, *[pointer] * 3, number
        )
        self.digest = _function(library.tmm_digest, number, pointer, size, size, size, pointer, number)
        self.code_sums = _function(
            library.tmm_code_sums, number, pointer, number, pointer, size, size, size, pointer, pointer, number
        )
        real = ctypes.c_double
        self.ssim = _function(
            library.tmm_ssim,
            number,
            *(pointer, pointer, number, size, size, size, pointer, size, real, real, real, pointer, pointer, number),
        )
        self._library = library
        if (found := library.tmm_abi_version()) != ABI_VERSION:
            raise NativeUnavailableError(f"{path} has interface version {found}, this package needs {ABI_VERSION}")

    @property
    def isa(self) -> str:
        """The instruction set in use, one of ISAS."""
        return self._library.tmm_isa().decode()

    def select_isa(self, name: str) -> None:
        """Pin the instruction set of codebooks packed from now on (for tests); ValueError if this CPU lacks it."""
        if self._library.tmm_select_isa(name.encode()) != OK:
            raise ValueError(f"isa: expected one this CPU has, got {name}")

    def cap_isa(self, cap: str) -> None:
        """Pin the strongest instruction set that this CPU has and that is not stronger than `cap`."""
        for name in reversed(ISAS[: ISAS.index(cap) + 1]):
            if self._library.tmm_select_isa(name.encode()) == OK:
                return


def _function(function, result, *arguments):
    function.restype, function.argtypes = result, arguments
    return function


def isa_cap() -> str:
    """The strongest instruction set that TOKENIZERS_MM_ISA allows; ValueError if it names none."""
    cap = os.environ.get("TOKENIZERS_MM_ISA", ISAS[-1])
    require(cap in ISAS, "TOKENIZERS_MM_ISA", f"one of {', '.join(ISAS)}", cap)
    return cap


@functools.cache
def _load() -> CpuLibrary | str:
    cap = isa_cap()
    path = library_path("tokenizers_mm")
    if path is None:
        return "the native library is not installed: install a C++ compiler and run pip install again"
    try:
        library = CpuLibrary(path)
        library.cap_isa(cap)
    except (OSError, AttributeError, NativeUnavailableError) as error:
        return f"the native library cannot be loaded: {error}"
    _log.info("native kernels: %s (%s)", library.isa, path)
    return library


def cpu() -> CpuLibrary:
    """The loaded library. Raises NativeUnavailableError with the reason."""
    library = _load()
    if isinstance(library, str):
        raise NativeUnavailableError(library)
    return library


def cpu_or_none() -> CpuLibrary | None:
    """The loaded library, or None where there is none."""
    library = _load()
    return None if isinstance(library, str) else library


def check(status: int, what: str) -> None:
    """Turn a status of the library into an exception."""
    if status == NO_MEMORY:
        raise MemoryError(f"{what}: out of memory")
    if status in (BAD_QUERY, BAD_CODES):
        raise NotFiniteError(f"{what}: expected finite values, got NaN or infinity")
    if status != OK:
        raise RuntimeError(f"{what}: the native library refused its arguments")


def dtype_code(tensor: Tensor) -> int:
    """TMM_F32 or TMM_F64."""
    return 1 if tensor.element_size() == 8 else 0
