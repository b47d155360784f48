"""One wording for every argument error: `name: expected WHAT, got WHAT`. Neither torch nor numpy is imported here."""

from reprlib import Repr
from typing import Any, NoReturn

LONGEST = 200
"""Characters of a described value: a longer text keeps its two ends."""

_REPR = Repr()
_REPR.maxlist = _REPR.maxtuple = _REPR.maxset = _REPR.maxfrozenset = _REPR.maxdict = _REPR.maxarray = 8
_REPR.maxstring = _REPR.maxother = _REPR.maxlong = LONGEST


def describe(value: Any) -> str:
    """A form of a value for an error, on one line of at most `LONGEST` characters.

    Arrays and tensors give dtype and shape, strings themselves, collections their first members.
    """
    if hasattr(value, "dtype") and hasattr(value, "shape"):
        return f"{str(value.dtype).removeprefix('torch.')} {list(value.shape)}"
    return shorten(value if isinstance(value, str) else _REPR.repr(value))


def shorten(text: str, longest: int = LONGEST) -> str:
    """A text on one line of at most `longest` characters: unprintable ones escaped, the middle left out."""
    line = " ".join(text.split())
    line = line if line.isprintable() else repr(line)[1:-1]
    if len(line) <= longest:
        return line
    mark = f" [{len(line)} characters] "
    half = (longest - len(mark)) // 2
    return line[:half] + mark + line[-half:]


def fail(name: str, expected: str, got: Any) -> NoReturn:
    """Raise the one ValueError of this library."""
    raise ValueError(f"{shorten(name)}: expected {expected}, got {describe(got)}")


def require(condition: bool, name: str, expected: str, got: Any) -> None:
    """`fail` unless the condition holds."""
    if not condition:
        fail(name, expected, got)
