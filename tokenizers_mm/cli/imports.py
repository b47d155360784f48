"""`--import FILE`, an option of every verb: run a Python file of the caller's, which registers parts of its own.

The file is executed because the caller named it; no checkpoint or configuration can name one.
"""

import importlib
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from tokenizers_mm._check import expecting, require
from tokenizers_mm._files import regular_file

OPTION = "--import"

FAULTS = (SyntaxError, ImportError, NameError, AssertionError, RuntimeError, OSError)
"""Errors of a file that is no working program, beside those of `expecting`; a ValueError of ours is passed on."""


def split_imports(arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    """Arguments without the option, and the files that it named, in order."""
    rest, files = [], []
    given = iter(arguments)
    for argument in given:
        if argument == OPTION:
            files.append(next(given, ""))
        elif argument.startswith(f"{OPTION}="):
            files.append(argument.partition("=")[2])
        else:
            rest.append(argument)
    return rest, files


def run_imports(files: Sequence[str]) -> None:
    """Import each file as a module of its own name, so that worker processes find it too."""
    for name in files:
        path = Path(os.path.realpath(regular_file(name, "a Python file")))
        require(
            path.suffix == ".py" and path.stem.isidentifier(), OPTION, "a file whose name is that of a module", name
        )
        if str(path.parent) not in sys.path:
            sys.path.append(str(path.parent))
        with expecting(f"{OPTION} {name}", "a Python file that runs", *FAULTS):
            module = importlib.import_module(path.stem)
        found = getattr(module, "__file__", None)
        other = found is None or os.path.realpath(found) != str(path)
        require(not other, f"{OPTION} {name}", "a name that no other module has", f"{path.stem} ({found})")
