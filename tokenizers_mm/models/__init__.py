"""The composed tokenizers, and the one table of their names."""

from typing import Any

from tokenizers_mm.models.base import ImageTokenizer, Provenance
from tokenizers_mm.models.mar import MAR, MARConfig
from tokenizers_mm.models.tokenflow import TokenFlow, TokenFlowConfig

MODELS: dict[str, type[ImageTokenizer[Any]]] = {"tokenflow": TokenFlow, "mar": MAR}

__all__ = ["MAR", "MODELS", "ImageTokenizer", "MARConfig", "Provenance", "TokenFlow", "TokenFlowConfig"]
