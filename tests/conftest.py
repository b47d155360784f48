"""Fixtures that tests of several folders share."""

import signal
from collections.abc import Iterator

import pytest
import torch

from tests.deprecations import refuse_our_deprecated_calls


def pytest_configure() -> None:
    """Let tests that interrupt work in a shell's background job too, which ignores SIGINT and hands that down."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


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
