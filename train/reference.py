"""The page of all keys of a training configuration: every run, every objective, every family of tokenizers."""

from collections.abc import Iterator

from tokenizers_mm.config import Choice
from tokenizers_mm.config_reference import choices_of, keys_of
from tokenizers_mm.models import MODELS
from tokenizers_mm.registry import OBJECTIVES as REGISTERED

from .config import OBJECTIVES, RunConfig, objective_class


def text() -> str:
    """The reference as plain text, for a terminal."""
    parts = []
    for title, schema in sections():
        lines = [title, "=" * len(title)]
        for key in keys_of(schema):
            indent = "  " * key.depth
            lines.append(f"{indent}{key.name}: {key.kind} [{key.default}]")
            lines += [f"{indent}    {key.meaning}"] if key.meaning else []
        parts.append("\n".join(lines))
    return "\n\n".join(parts)


def markdown() -> str:
    """The reference as a page of the documentation."""
    parts = ["# Configuration reference", "", "Generated from the configuration classes. `tokenizers-mm train --help`"]
    parts += ["prints the same; `tokenizers-mm train CONFIG --check` prints a whole configuration with its values.", ""]
    for title, schema in sections():
        parts += [f"## {title}", "", "| key | type | default | meaning |", "|---|---|---|---|"]
        for key in keys_of(schema):
            cells = [f"`{'. ' * key.depth}{key.name}`", key.kind, f"`{key.default}`", key.meaning]
            parts.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
        parts.append("")
    return "\n".join(parts)


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
