"""Features to ids and vectors, and back; and the one table of the kinds."""

from tokenizers_mm.quantizers.base import QUANTIZERS, Quantizer, build_quantizer
from tokenizers_mm.quantizers.binary import BSQ, LFQ, BSQConfig, LFQConfig
from tokenizers_mm.quantizers.fsq import FSQ, FSQConfig
from tokenizers_mm.quantizers.fvq import FVQ, FVQConfig
from tokenizers_mm.quantizers.ibq import IBQ, IBQConfig
from tokenizers_mm.quantizers.multi_codebook import MultiCodebook, MultiCodebookConfig
from tokenizers_mm.quantizers.multiscale import MultiScaleQuantizer, ScalesConfig, SmoothingConfig
from tokenizers_mm.quantizers.per_dimension import PerDimension, PerDimensionConfig
from tokenizers_mm.quantizers.residual import ResidualConfig, ResidualQuantizer
from tokenizers_mm.quantizers.shared_index import SharedIndexConfig, SharedIndexQuantizer
from tokenizers_mm.quantizers.vq import VQ, SimVQ, SimVQConfig, VQConfig

QUANTIZERS.update(
    {
        "bsq": BSQ,
        "fsq": FSQ,
        "fvq": FVQ,
        "ibq": IBQ,
        "lfq": LFQ,
        "multi_codebook": MultiCodebook,
        "per_dimension": PerDimension,
        "residual": ResidualQuantizer,
        "shared_index": SharedIndexQuantizer,
        "simvq": SimVQ,
        "vq": VQ,
    }
)

__all__ = [
    "BSQ",
    "FSQ",
    "FVQ",
    "IBQ",
    "LFQ",
    "QUANTIZERS",
    "VQ",
    "BSQConfig",
    "FSQConfig",
    "FVQConfig",
    "IBQConfig",
    "LFQConfig",
    "MultiCodebook",
    "MultiCodebookConfig",
    "MultiScaleQuantizer",
    "PerDimension",
    "PerDimensionConfig",
    "Quantizer",
    "ResidualConfig",
    "ResidualQuantizer",
    "ScalesConfig",
    "SharedIndexConfig",
    "SharedIndexQuantizer",
    "SimVQ",
    "SimVQConfig",
    "SmoothingConfig",
    "VQConfig",
    "build_quantizer",
]
