"""The composed tokenizers, and the one table of their names."""

from typing import Any

from tokenizers_mm.models.base import ImageTokenizer, Provenance
from tokenizers_mm.models.tokenflow import TokenFlow, TokenFlowConfig

MODELS: dict[str, type[ImageTokenizer[Any]]] = {"tokenflow": TokenFlow}

__all__ = ["MODELS", "ImageTokenizer", "Provenance", "TokenFlow", "TokenFlowConfig"]
