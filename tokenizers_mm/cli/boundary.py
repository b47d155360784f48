"""The boundary of every command: an error becomes one sentence on stderr and an exit code."""

import io
import os
import sys
import traceback
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from tokenizers_mm._check import printable, shorten

TRACEBACK = "TOKENIZERS_MM_TRACEBACK"
"""Environment variable: where it is set, an error ends with Python's traceback too."""

PACKAGE = str(Path(__file__).parents[1])
"""Folder of the library."""

NO_DEVICE = (
    "No CUDA GPUs",
    "no NVIDIA driver",
    "not compiled with",
    "not linked with support for",
    "invalid device ordinal",
    "device type at start of device string",
    "Invalid device",
    "PyTorch is not built with",
)
"""Parts of what torch says (as RuntimeError or AssertionError) of a device that is not there."""

NO_MEMORY = ("not enough memory", "can't allocate memory")
"""Parts of what torch says (as RuntimeError) of memory that is not there, on several systems."""


def guarded(program: str, run: Callable[[], int | None]) -> int:
    """The boundary of every command: run it, and turn an error into one sentence on stderr and an exit code.

    program: what the sentence begins with. Returns: the code of `run` (None is 0); 2 for bad input, files, devices and
    memory; 130 after an interrupt; 141 where the reader of stdout is gone; 1 for a failure of ours.
    """
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # closed by the caller: what is said goes nowhere
            setattr(sys, name, os.fdopen(os.open(os.devnull, os.O_WRONLY), "w", encoding="utf-8"))
    if isinstance(sys.stdout, io.TextIOWrapper):  # file names that are no UTF-8 can be printed
        sys.stdout.reconfigure(errors="backslashreplace")
    usual = warnings.formatwarning
    warnings.formatwarning = partial(_format_warning, program, usual)
    try:
        code = run() or 0
        sys.stdout.flush()
        return code
    except KeyboardInterrupt:
        message, code = "interrupted", 130
    except BrokenPipeError:
        _forget_unwritten()
        return 141
    except Exception as error:  # the one place of the command line where any error may end
        if os.environ.get(TRACEBACK):
            traceback.print_exc()
        message, code = explain(error)
        _forget_unwritten()
    finally:
        warnings.formatwarning = usual
    print(f"{program}: {message}", file=sys.stderr)
    return code


def _format_warning(program: str, usual: Callable[..., str], message: Any, category: Any, *place: Any) -> str:
    """A warning that this library gives to users as one sentence, like an error; others as usual."""
    ours = category is UserWarning and str(place[0]).startswith(PACKAGE)
    return f"{program}: {message}\n" if ours else usual(message, category, *place)


def _forget_unwritten() -> None:
    """Let the interpreter flush stdout once more at its end without an error: on a full disk, or without a reader."""
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def explain(error: Exception) -> tuple[str, int]:
    """One sentence for an error, and the exit code: 2 for what the caller can mend, 1 for a failure of ours."""
    text, kind = str(error), type(error).__name__
    if "in DataLoader worker process" in text:  # the traceback of the worker, its last line `Type: message`
        text = text.strip().splitlines()[-1]
        text = text.partition(": ")[2] or text
    if isinstance(error, UnicodeDecodeError):
        return f"text: expected {error.encoding}, got byte 0x{error.object[error.start]:02x} at {error.start}", 2
    if isinstance(error, MemoryError) or kind == "OutOfMemoryError" or any(part in text for part in NO_MEMORY):
        return f"memory: expected enough for this input, got {shorten(text or kind)}", 2
    if isinstance(error, OSError) and error.filename is not None:
        name = error.filename
        return f"{printable(os.fsdecode(name) if isinstance(name, bytes) else str(name))}: {error.strerror or kind}", 2
    if isinstance(error, (ValueError, FloatingPointError)):
        return shorten(text, 1000) or kind, 2
    if isinstance(error, ImportError):
        return f"expected an optional package to be installed, got {shorten(text)}", 2
    if isinstance(error, OSError) or kind == "SafetensorError":
        return f"file: expected one that can be read and written, got {shorten(text or kind)}", 2
    if isinstance(error, (RuntimeError, AssertionError)) and any(part in text for part in NO_DEVICE):
        return f"device: expected one that torch can use here, got {shorten(text)}", 2
    if "DataLoader worker" in text or kind == "BrokenProcessPool":
        return f"workers: expected processes that live to the end, got {shorten(text)}", 2
    frame = traceback.extract_tb(error.__traceback__)[-1]
    where = f"{Path(frame.filename).name}:{frame.lineno}"
    return f"a failure of tokenizers_mm: {kind}: {shorten(text)} (at {where}; {TRACEBACK}=1 shows more)", 1
