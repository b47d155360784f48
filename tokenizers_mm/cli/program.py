"""The training program, which is not part of the library; the wheel installs it beside it."""

import runpy
import sys
from importlib.util import find_spec
from pathlib import Path

from tokenizers_mm._check import fail

PROGRAM = "tokenizers_mm.train"
"""Name of the training program as a module."""


def find_program() -> Path:
    """The file that is the training program's package; ValueError where only the library is on the path."""
    found = find_spec(PROGRAM)
    if found is None or found.origin is None:
        fail("training program", "an installed tokenizers_mm (pip install .)", "a folder on the path")
    return Path(found.origin)


def run_program(module: str, arguments: list[str]) -> int:
    """Run a module of the training program as `python -m` would, in this process; ValueError where there is none."""
    find_program()
    before = sys.argv
    sys.argv = [module, *arguments]
    try:
        runpy.run_module(module, run_name="__main__", alter_sys=True)
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    finally:
        sys.argv = before
    return 0
