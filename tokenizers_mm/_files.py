"""Files that are either whole or not there: everything is written beside its place and moved in at the end."""

import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tokenizers_mm._check import fail


def regular_file(path: str | os.PathLike[str], expected: str = "a file") -> Path:
    """The path, if it is a regular file or a link to one. A FIFO or a device could block a reader or never end."""
    file = Path(path)
    if not file.is_file():
        fail(str(file), expected, "something that is no regular file" if file.exists() else "no such file")
    return file


@contextmanager
def atomic_path(path: str | os.PathLike[str]) -> Iterator[Path]:
    """A temporary name beside `path`; it takes the place of `path` when the block ends without an error."""
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=f".{target.name}.", dir=target.parent)
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        _sync(temporary)
        os.chmod(temporary, 0o644)
        os.replace(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def atomic_directory(directory: str | os.PathLike[str]) -> Iterator[Path]:
    """A temporary folder whose files take their places in `directory` when the block ends without an error.

    A new directory appears in one move. In one that exists only the files written are replaced, each in one move.
    """
    target = Path(directory)
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    try:
        yield temporary
        os.chmod(temporary, 0o755)
        for path in temporary.rglob("*"):
            if path.is_file():
                _sync(path)
                os.chmod(path, 0o644)
        if not target.exists():
            os.replace(temporary, target)
            return
        for path in sorted(temporary.rglob("*")):
            if path.is_file():
                place = target / path.relative_to(temporary)
                place.parent.mkdir(parents=True, exist_ok=True)
                os.replace(path, place)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def write_json(path: str | os.PathLike[str], value: Any) -> None:
    """Write JSON atomically, indented, with a final newline."""
    with atomic_path(path) as temporary:
        temporary.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _sync(path: Path) -> None:
    with open(path, "rb") as stream:
        os.fsync(stream.fileno())
