"""Deprecations that name a call of this project, told from those that a dependency raises about its own code.

The filters of pyproject.toml go by the module a warning is attributed to. That is often not the caller: a decorator of
`transformers` with stacklevel 2 names the file of `nn.Module.__call__`, and a function with stacklevel 1 names itself.
So the caller is looked up on the stack.
"""

import contextlib
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Any

from tests.cases import ROOT

OURS = tuple(str(ROOT / folder) + "/" for folder in ("tokenizers_mm", "train", "tests", "benchmarks"))
BETWEEN = ("/torch/nn/modules/module.py", "/torch/utils/_contextlib.py", "/functools.py", "/contextlib.py")
"""Files that stand between a call and the function called."""


@contextlib.contextmanager
def refuse_our_deprecated_calls() -> Iterator[None]:
    """Within it, a deprecation warning about a call of this project is raised as an error."""
    before = warnings.showwarning

    def show(message: Any, category: type[Warning], filename: str, lineno: int, *rest: Any, **named: Any) -> None:
        kinds = (DeprecationWarning, PendingDeprecationWarning, FutureWarning)
        if issubclass(category, kinds) and _caller_is_ours(filename, lineno):
            raise message if isinstance(message, Warning) else category(message)
        shown = warnings.WarningMessage(message, category, filename, lineno, *rest, **named)
        warnings._showwarnmsg_impl(shown)  # type: ignore[attr-defined]

    warnings.showwarning = show
    try:
        yield
    finally:
        warnings.showwarning = before


def _caller_is_ours(filename: str, lineno: int) -> bool:
    """True if a warning is about a call of this project.

    A place that was chosen (stacklevel 2 or more) is believed, but for the files that stand between; a function that
    names itself means whoever called it.
    """
    frame: FrameType | None = sys._getframe(2)
    while frame is not None and frame.f_code.co_filename == warnings.__file__:
        frame = frame.f_back
    warned = frame
    while frame is not None and (frame.f_code.co_filename, frame.f_lineno) != (filename, lineno):
        frame = frame.f_back
    if frame is not None and frame is warned and not _is_ours(frame):
        frame = frame.f_back
    while frame is not None and frame.f_code.co_filename.endswith(BETWEEN):
        frame = frame.f_back
    return frame is not None and _is_ours(frame)


def _is_ours(frame: FrameType) -> bool:
    name = frame.f_code.co_filename
    return name.startswith(OURS) and "site-packages" not in Path(name).parts
