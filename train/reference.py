"""The page of all keys of a training configuration: every run, every objective, every family of tokenizers."""

from collections.abc import Iterator

from tokenizers_mm.config import Choice
from tokenizers_mm.config_reference import as_markdown, as_text, choices_of
from tokenizers_mm.models import MODELS
from tokenizers_mm.registry import OBJECTIVES as REGISTERED

from .config import OBJECTIVES, RunConfig, objective_class


def text() -> str:
    """The reference as plain text, for a terminal."""
    return as_text(sections())


def markdown() -> str:
    """The reference as a page of the documentation."""
    return f"""# Configuration reference

Generated from the configuration classes. `tokenizers-mm train --help`
prints the same; `tokenizers-mm train CONFIG --check` prints a whole configuration with its values.

{as_markdown(sections())}"""


def sections() -> Iterator[tuple[str, type]]:
    """Titles and dataclasses: the run, every objective, every family of tokenizers."""
    yield "Every run", RunConfig
    for kind in [*OBJECTIVES, *REGISTERED]:
        yield f"objective: {{kind: {kind}}}", objective_class(kind).Config
    tables: dict[int, tuple[str, Choice]] = {}
    for family, model in MODELS.items():
        yield f"objective.model: {{family: {family}, config: ...}}", model.Config
        for name, choice in choices_of(model.Config):
            tables.setdefault(id(choice.table), (name.rpartition("_")[2], choice))
    for name, choice in tables.values():
        for kind, entry in choice.table.items():
            yield f"{name}: {{kind: {kind}}}", entry.Config
