"""Generated parts of the documentation: the configuration reference and the table of checkpoints."""

import sys
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

CHECKPOINTS = "<!-- table of checkpoints -->"


def on_files(files: Files, config: Any) -> Files:
    """Add configuration.md."""
    from train.reference import markdown

    files.append(File.generated(config, "configuration.md", content=markdown()))
    return files


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Put the table of published checkpoints in its place."""
    if CHECKPOINTS not in markdown:
        return markdown
    from tokenizers_mm.checkpoints.convert import table

    return markdown.replace(CHECKPOINTS, "\n".join(table(markdown=True)))
