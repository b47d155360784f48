"""Fixtures that tests of several folders share."""

from collections.abc import Iterator

import pytest
import torch

from tests.deprecations import refuse_our_deprecated_calls


@pytest.fixture(autouse=True)
def _no_deprecated_calls() -> Iterator[None]:
    """A deprecation that names a call of this project is an error wherever it is raised."""
    with refuse_our_deprecated_calls():
        yield


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """Equality to the last bit needs one fixed number of threads, and tiny networks are faster on one."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
