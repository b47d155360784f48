"""All tests of language models run on one thread."""

import pytest


@pytest.fixture(autouse=True, scope="module")
def _one_thread(one_thread: None) -> None:
    """See the fixture that it asks for."""
