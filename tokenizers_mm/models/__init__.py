"""The composed tokenizers, and the one table of their names."""

from typing import Any

from tokenizers_mm.models.base import ImageTokenizer, Provenance
from tokenizers_mm.models.dualvitok import DualViTok, DualViTokConfig
from tokenizers_mm.models.from_encoder import tokenizer_from
from tokenizers_mm.models.mar import MAR, MARConfig
from tokenizers_mm.models.semantic import SemanticConfig, SemanticTokenizer
from tokenizers_mm.models.tokenflow import TokenFlow, TokenFlowConfig
from tokenizers_mm.models.vqgan import VQGAN, VQGANConfig

MODELS: dict[str, type[ImageTokenizer[Any]]] = {
    "dualvitok": DualViTok,
    "mar": MAR,
    "semantic": SemanticTokenizer,
    "tokenflow": TokenFlow,
    "vqgan": VQGAN,
}

__all__ = [
    "MAR",
    "MODELS",
    "VQGAN",
    "DualViTok",
    "DualViTokConfig",
    "ImageTokenizer",
    "MARConfig",
    "Provenance",
    "SemanticConfig",
    "SemanticTokenizer",
    "TokenFlow",
    "TokenFlowConfig",
    "VQGANConfig",
    "tokenizer_from",
]
