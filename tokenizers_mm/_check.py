"""One wording for every argument error: `name: expected WHAT, got WHAT`."""

from typing import Any, NoReturn

from torch import Tensor


def describe(value: Any) -> str:
    """A short form of a value for an error: dtype and shape for a tensor, the text itself for a string."""
    if isinstance(value, Tensor):
        return f"{str(value.dtype).removeprefix('torch.')} {list(value.shape)}"
    return shorten(value if isinstance(value, str) else repr(value))


def shorten(text: str, limit: int = 600) -> str:
    """A text for one line of an error: control characters escaped, the middle of a long one left out."""
    text = text if len(text) <= limit else f"{text[: limit // 2]} ... {text[-limit // 4 :]} ({len(text)} characters)"
    return text if text.isprintable() else repr(text)[1:-1]


def fail(name: str, expected: str, got: Any) -> NoReturn:
    """Raise the one ValueError of this library."""
    raise ValueError(f"{shorten(name)}: expected {expected}, got {describe(got)}")


def require(condition: bool, name: str, expected: str, got: Any) -> None:
    """`fail` unless the condition holds."""
    if not condition:
        fail(name, expected, got)
