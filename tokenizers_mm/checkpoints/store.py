"""Reading our own format: a directory that `ImageTokenizer.save` wrote, or the hub id of one."""

import os
from pathlib import Path
from typing import Any

import torch

from tokenizers_mm._check import fail
from tokenizers_mm.models import ImageTokenizer
from tokenizers_mm.models.loading import load_directory, usable_device
from tokenizers_mm.models.saving import CONFIG, WEIGHTS

SHIPPED = Path(__file__).resolve().parents[1] / "pretrained"
"""Tokenizers that come with the package; `tokenizers_mm/NAME` is the one in the folder NAME."""


def shipped() -> list[str]:
    """Names of the tokenizers that come with the package."""
    return sorted(f"tokenizers_mm/{path.parent.name}" for path in SHIPPED.glob(f"*/{CONFIG}"))


def load(
    source: str | os.PathLike[str], revision: str | None = None, device: torch.device | str | None = None
) -> ImageTokenizer[Any]:
    """A tokenizer from a directory, a hub id or the name of a shipped one ("tokenizers_mm/demo-64"), for evaluation.

    Strict: every tensor must be there with its shape, and no other. No code of the checkpoint is executed.
    """
    place = None if device is None else usable_device(device)
    tokenizer = load_directory(_directory(source, revision))
    return tokenizer if place is None else tokenizer.to(place)


def _directory(source: str | os.PathLike[str], revision: str | None) -> Path:
    path = Path(source)
    if path.is_dir():
        return path
    name = str(source)
    if name in shipped():
        return SHIPPED / name.partition("/")[2]
    if path.exists() or name.count("/") != 1 or name.startswith((".", "/", "~")):
        fail("source", "a directory written by save, or a hub id such as 'owner/name'", name)
    if name.startswith("tokenizers_mm/"):
        fail("source", f"one of the shipped tokenizers {shipped()}", name)
    from huggingface_hub import snapshot_download  # network code: loaded when asked for
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=[CONFIG, "*.json", WEIGHTS, "*.md"]))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        fail("source", "a directory, or a hub id that can be reached", f"{name!r} ({type(error).__name__})")
