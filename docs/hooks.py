"""Pages that are generated when the documentation is built: the configuration reference."""

import sys
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))


def on_files(files: Files, config: Any) -> Files:
    """Add configuration.md."""
    from train.reference import markdown

    files.append(File.generated(config, "configuration.md", content=markdown()))
    return files
