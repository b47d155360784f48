"""Features to ids and vectors, and back; and the one table of the kinds."""

from tokenizers_mm.quantizers.base import QUANTIZERS, Quantizer, build_quantizer
from tokenizers_mm.quantizers.fsq import FSQ, FSQConfig
from tokenizers_mm.quantizers.multiscale import MultiScaleQuantizer
from tokenizers_mm.quantizers.residual import ResidualConfig, ResidualQuantizer
from tokenizers_mm.quantizers.shared_index import SharedIndexConfig, SharedIndexQuantizer
from tokenizers_mm.quantizers.vq import VQ, SimVQ, SimVQConfig, VQConfig

QUANTIZERS.update(
    {
        "fsq": FSQ,
        "residual": ResidualQuantizer,
        "shared_index": SharedIndexQuantizer,
        "simvq": SimVQ,
        "vq": VQ,
    }
)

__all__ = [
    "FSQ",
    "QUANTIZERS",
    "VQ",
    "FSQConfig",
    "MultiScaleQuantizer",
    "Quantizer",
    "ResidualConfig",
    "ResidualQuantizer",
    "SharedIndexConfig",
    "SharedIndexQuantizer",
    "SimVQ",
    "SimVQConfig",
    "VQConfig",
    "build_quantizer",
]
