"""A small configuration of every kind of quantizer and of each of its variants, with four channels."""

from collections.abc import Callable

from tokenizers_mm.quantizers import (
    BSQConfig,
    FSQConfig,
    FVQConfig,
    IBQConfig,
    LFQConfig,
    MultiCodebookConfig,
    MultiScaleQuantizer,
    PerDimensionConfig,
    Quantizer,
    ResidualConfig,
    ScalesConfig,
    SharedIndexConfig,
    SimVQConfig,
    SmoothingConfig,
    VQConfig,
    build_quantizer,
)

DIM = 4
GRIDS = [(1, 1), (2, 2)]

CONFIGS = {
    "vq": VQConfig(16, DIM),
    "vq, unit": VQConfig(16, DIM, "unit", entropy_temperature=0.5),
    "vq, cosine": VQConfig(16, DIM, "cosine", entropy_temperature=0.5),
    "vq, rotation": VQConfig(16, DIM, rotation=True),
    "simvq": SimVQConfig(16, DIM),
    "simvq, bias": SimVQConfig(16, DIM, 3, bias=True),
    "simvq, rotation": SimVQConfig(16, DIM, rotation=True),
    "fvq": FVQConfig(16, DIM, group=4, width=8, depth=1, heads=2),
    "ibq": IBQConfig(16, DIM, entropy_temperature=0.5),
    "ibq, unit": IBQConfig(16, DIM, 2.0, normalize=True),
    "lfq": LFQConfig(DIM, temperature=1.0),
    "lfq, groups": LFQConfig(DIM, groups=2, temperature=1.0, pool=True),
    "lfq, single bits": LFQConfig(DIM, order="msb_first", entropy_bits=1, temperature=1.0, codebook_term=True),
    "bsq": BSQConfig(DIM),
    "bsq, bits as ids": BSQConfig(DIM, groups=DIM, entropy_bits=2, scale_gradient=False),
    "fsq": FSQConfig((5, 4), DIM),
    "fsq, symmetric": FSQConfig((4, 3, 2, 5), DIM, "symmetric", project=False),
    "fsq, sigmoid": FSQConfig((5, 4), DIM, "sigmoid"),
    "shared index": SharedIndexConfig(16, (3, 1), (1.0, 2.0), entropy_temperature=0.1),
    "residual": ResidualConfig(VQConfig(16, DIM), 2),
    "multi-codebook": MultiCodebookConfig(VQConfig(16, DIM // 2, "unit"), 2),
    "multi-codebook, groups": MultiCodebookConfig(LFQConfig(DIM // 2, groups=2, temperature=1.0), 2),
    "per dimension": PerDimensionConfig(DIM),
    "per dimension, uniform": PerDimensionConfig(DIM, 4, -3.0, 3.0, "uniform"),
}

SCALES = {
    "scales": ("shared index", ScalesConfig()),
    "scales, VAR": ("vq", ScalesConfig(smoothing=SmoothingConfig(2), learning="by_sum")),
    "scales, Infinity": ("bsq, bits as ids", ScalesConfig(upsampling="bilinear")),
    "scales, residual": ("residual", ScalesConfig()),
}

MAKERS: dict[str, Callable[[], Quantizer]] = {
    **{name: (lambda config=config: build_quantizer(config)) for name, config in CONFIGS.items()},
    **{
        name: (lambda inner=inner, scales=scales: MultiScaleQuantizer(build_quantizer(CONFIGS[inner]), GRIDS, scales))
        for name, (inner, scales) in SCALES.items()
    },
}
"""Features are [B, 2, 2, DIM] for all."""
