"""Warnings that fail a test, and those that do not: our call of something deprecated, a dependency's own."""

import warnings
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from torch import nn

DEPENDENCY = """
import functools
import warnings


def renamed(function):
    @functools.wraps(function)
    def inner(*arguments, old=None, **named):
        if old is not None:
            warnings.warn("`old` is deprecated, use `new`", FutureWarning, stacklevel=2)
        return function(*arguments, **named)

    return inner


def own_affair(kind):
    warnings.warn("our own code is old", kind, stacklevel=2)


def calls_itself(kind):
    own_affair(kind)


def blames_nobody(kind):
    warnings.warn("this function is deprecated", kind)


def module(nn):
    class Layer(nn.Module):
        @renamed
        def forward(self, new=None):
            return 1

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = Layer()

        def forward(self):
            return self.layer(old=1)

    return Layer(), Model()
"""

KINDS = [DeprecationWarning, PendingDeprecationWarning, FutureWarning]


@pytest.fixture
def dependency(tmp_path: Path) -> Any:
    """A module that lies outside of this project."""
    path = tmp_path / "dependency.py"
    path.write_text(DEPENDENCY)
    module = ModuleType("dependency")
    exec(compile(DEPENDENCY, str(path), "exec"), module.__dict__)
    return module


@pytest.mark.parametrize("kind", KINDS)
def test_our_call_of_something_deprecated_is_an_error(dependency: Any, kind: type[Warning]) -> None:
    with pytest.raises(kind, match="our own code is old"):
        dependency.own_affair(kind)  # attributed to this file
    with pytest.raises(kind, match="this function is deprecated"):
        dependency.blames_nobody(kind)  # attributed to the dependency, which this file called


def test_our_call_of_a_module_is_an_error_although_the_warning_names_torch(dependency: Any) -> None:
    layer, model = dependency.module(nn)
    with pytest.raises(FutureWarning, match="use `new`"):
        layer(old=1)
    assert model() == 1  # the dependency's own call of its own layer


@pytest.mark.parametrize("kind", KINDS)
def test_a_dependency_may_warn_of_its_own_affairs(dependency: Any, kind: type[Warning]) -> None:
    dependency.calls_itself(kind)


def test_other_warnings_are_errors() -> None:
    with pytest.raises(UserWarning, match="anything"):
        warnings.warn("anything", UserWarning, stacklevel=1)
