"""The tables of the library, given back as they were after a test that registers parts of its own."""

from collections.abc import Iterator
from contextlib import contextmanager

from tokenizers_mm import registry


@contextmanager
def kept_tables() -> Iterator[None]:
    """Leave every table, and what `register` remembers, as the block found it."""
    tables = {kind: registry._table(spec) for kind, spec in registry.KINDS.items()}
    before, added = {kind: dict(table) for kind, table in tables.items()}, dict(registry._added)
    try:
        yield
    finally:
        for kind, table in tables.items():
            table.clear()
            table.update(before[kind])
        registry._added.clear()
        registry._added.update(added)
