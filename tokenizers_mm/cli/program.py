"""The training program, which is not part of the library; the wheel installs it beside it."""

import runpy
import sys

PROGRAM = "tokenizers_mm.train"
"""Name of the training program as a module."""


def run_program(module: str, arguments: list[str]) -> int:
    """Run a module of the training program as `python -m` would, in this process."""
    before = sys.argv
    sys.argv = [module, *arguments]
    try:
        runpy.run_module(module, run_name="__main__", alter_sys=True)
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    finally:
        sys.argv = before
    return 0
