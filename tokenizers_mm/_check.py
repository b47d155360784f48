"""One wording for every argument error: `name: expected WHAT, got WHAT`. Neither torch nor numpy is imported here."""

import math
import re
from collections.abc import Iterator
from contextlib import contextmanager
from reprlib import Repr
from typing import Any, NoReturn

LONGEST = 200
"""Characters of a described value: a longer text keeps its two ends."""

_ADDRESS = re.compile(r" at 0x[0-9a-fA-F]+(?=>)")
"""End of the `repr` of an object that has none of its own."""


class _Repr(Repr):
    def repr_int(self, x: int, level: int) -> str:
        """Python refuses to print very large integers."""
        return repr(x) if x.bit_length() < 1000 else f"an integer of {x.bit_length()} bits"


_REPR = _Repr()
_REPR.maxlist = _REPR.maxtuple = _REPR.maxset = _REPR.maxfrozenset = _REPR.maxdict = _REPR.maxarray = 8
_REPR.maxstring = _REPR.maxother = _REPR.maxlong = LONGEST


def describe(value: Any, limit: int = LONGEST) -> str:
    """A form of a value for an error, on one line of at most `limit` characters.

    Arrays and tensors give dtype and shape, strings themselves, collections their first members.
    """
    if hasattr(value, "dtype") and hasattr(value, "shape"):
        return f"{str(value.dtype).removeprefix('torch.')} {list(value.shape)}"
    return shorten(value if isinstance(value, str) else _REPR.repr(value), limit)


def shorten(text: str, limit: int = LONGEST) -> str:
    """A text on one line: control characters and bytes that are no UTF-8 escaped, the middle of a long one left out.

    Addresses in memory are left out too, so that one fault has one sentence in every run.
    """
    text = _ADDRESS.sub("", " ".join(text.split()))
    if len(text) > limit:
        mark = f" ... ({len(text)} characters) ... "
        kept = (limit - len(mark)) // 2
        text = text[:kept] + mark + text[-kept:]
    return printable(text)


def printable(text: str) -> str:
    """A text whole, with control characters and bytes that are no UTF-8 escaped where it has any."""
    return text if text.isprintable() else repr(text)[1:-1]


def fail(name: str, expected: str, got: Any, limit: int = LONGEST) -> NoReturn:
    """Raise the one ValueError of this library; `limit` is for a `got` that is a list of faults."""
    raise ValueError(f"{shorten(name, 1000)}: expected {expected}, got {describe(got, limit)}")


def require(condition: bool, name: str, expected: str, got: Any) -> None:
    """`fail` unless the condition holds."""
    if not condition:
        fail(name, expected, got)


@contextmanager
def expecting(name: str, expected: str, *more: type[Exception]) -> Iterator[None]:
    """Turn what values of a wrong form cause in the block into the one error; those that have its form pass.

    more: kinds of errors beside those of wrong types, keys and numbers.
    """
    try:
        yield
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError, *more) as error:
        if isinstance(error, ValueError) and ": expected " in str(error):
            raise
        fail(name, expected, f"{type(error).__name__}: {shorten(str(error))}")


@contextmanager
def naming(name: str) -> Iterator[None]:
    """Errors of the block about an "image" begin with this name in its place."""
    try:
        yield
    except ValueError as error:
        if not str(error).startswith("image: "):
            raise
        raise ValueError(f"{name}{str(error).removeprefix('image')}") from None


def require_finite(name: str, what: str, tensor: Any) -> None:
    """Refuse NaN and infinity, naming the first place. Reads the tensor back from its device."""
    bad = ~tensor.isfinite()
    if bool(bad.any()):
        place = bad.nonzero()[0].tolist()
        kind = "NaN" if bool(tensor[tuple(place)].isnan()) else "infinity"
        fail(name, f"finite {what}", f"{kind} at {place}")


def finite_extremes(x: Any, name: str) -> tuple[float, float]:
    """The least and the greatest value, (0, 0) of none; NaN and infinity are refused, which these two tell."""
    low, high = map(float, x.detach().aminmax()) if x.numel() else (0.0, 0.0)
    require(math.isfinite(low) and math.isfinite(high), name, "finite values", "NaN or infinity")
    return low, high
