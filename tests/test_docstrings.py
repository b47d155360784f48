"""Every public name says what it is, with the shapes of its tensors and what it refuses."""

import importlib
import inspect
import re
from collections.abc import Iterator
from typing import Any

import pytest

import tokenizers_mm as tmm

MODULES = ("kernels", "models", "quantizers", "llm")
"""Modules whose re-exported names are public, beside those of `tokenizers_mm` itself."""

SHAPE = re.compile(r"\[[^\]]+\]|\bscalar\b|of any shape|same shape|any shape")


def public() -> Iterator[tuple[str, Any]]:
    """Names and values: functions, classes, and the methods and properties that a public class defines itself."""
    found: dict[str, Any] = {name: getattr(tmm, name) for name in tmm._HOMES}
    for module in MODULES:
        part = importlib.import_module(f"tokenizers_mm.{module}")
        names = getattr(part, "__all__", None) or [n for n in vars(part) if not n.startswith("_") and n not in MODULES]
        ours = {n: getattr(part, n) for n in names}
        found |= {
            f"{module}.{n}": v for n, v in ours.items() if getattr(v, "__module__", "").startswith("tokenizers_mm")
        }
    seen = set()
    for name, value in found.items():
        if id(value) in seen or not callable(value):
            continue
        seen.add(id(value))
        yield name, value
        for key, member in vars(value).items() if inspect.isclass(value) else ():
            function = member.fget if isinstance(member, property) else getattr(member, "__func__", member)
            inherited = any(key in vars(base) for base in value.__mro__[1:])
            if inspect.isfunction(function) and not key.startswith("_") and (function.__doc__ or not inherited):
                yield f"{name}.{key}", function


def refuses(value: Any) -> bool:
    """True where a function, or a method that makes or checks an instance of a class, raises an argument error."""
    makers = ("__init__", "__post_init__", "check")
    parts = [vars(value).get(name) for name in makers] if inspect.isclass(value) else [inspect.unwrap(value)]
    written = [part for part in parts if inspect.isfunction(part) and not part.__code__.co_filename.startswith("<")]
    return any(re.search(r"\b(require|fail)\(|raise ValueError", inspect.getsource(part)) for part in written)


NAMES = dict(public())


def test_the_names_are_there() -> None:
    assert {"load", "ImageTokenizer.encode", "kernels.nearest_code", "quantizers.FSQ", "llm.generate"} <= NAMES.keys()
    assert len(NAMES) > 120


@pytest.mark.parametrize("name", NAMES)
def test_a_public_name_is_explained(name: str) -> None:
    value = NAMES[name]
    said = inspect.getdoc(value) or ""
    assert len(said.split()) >= 4, f"{name} has no docstring"
    owner = NAMES.get(name.rpartition(".")[0])
    context = said + (inspect.getdoc(owner) or "" if owner is not None else "")
    signature = inspect.signature(value)
    annotations = [p.annotation for p in signature.parameters.values()] + [signature.return_annotation]
    tensors = [a for a in map(str, annotations) if re.search(r"\bTensor\b", a)]
    plain = [a for a in tensors if not re.search(r"Tensor, ['\"\\]", a)]  # those of jaxtyping say their shapes
    assert not plain or SHAPE.search(context), f"{name}: say the shapes of its tensors, as [B, 3, H, W]"
    if refuses(value):
        assert re.search(r"ValueError|Raises|[Rr]efuse|error", context), f"{name}: say what raises an error"
