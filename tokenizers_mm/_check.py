"""One wording for every argument error: `name: expected WHAT, got WHAT`."""

from typing import Any, NoReturn

from torch import Tensor


def describe(value: Any) -> str:
    """A short form of a value for an error: dtype and shape for a tensor, the text itself for a string."""
    if isinstance(value, Tensor):
        return f"{str(value.dtype).removeprefix('torch.')} {list(value.shape)}"
    return value if isinstance(value, str) else repr(value)


def fail(name: str, expected: str, got: Any) -> NoReturn:
    """Raise the one ValueError of this library."""
    raise ValueError(f"{name}: expected {expected}, got {describe(got)}")


def require(condition: bool, name: str, expected: str, got: Any) -> None:
    """`fail` unless the condition holds."""
    if not condition:
        fail(name, expected, got)


def require_finite(name: str, what: str, tensor: Tensor) -> None:
    """Refuse NaN and infinity, naming the first place. Reads the tensor back from its device."""
    bad = ~tensor.isfinite()
    if bool(bad.any()):
        place = bad.nonzero()[0].tolist()
        kind = "NaN" if bool(tensor[tuple(place)].isnan()) else "infinity"
        fail(name, f"finite {what}", f"{kind} at {place}")
