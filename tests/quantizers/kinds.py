"""A small configuration of every kind of quantizer and of each of its variants, with four channels."""

from collections.abc import Callable

from tokenizers_mm import quantizers as q

DIM = 4
GRIDS = [(1, 1), (2, 2)]

CONFIGS = {
    "vq": q.VQConfig(16, DIM),
    "vq, unit": q.VQConfig(16, DIM, "unit", entropy_temperature=0.5),
    "vq, cosine": q.VQConfig(16, DIM, "cosine", entropy_temperature=0.5),
    "vq, rotation": q.VQConfig(16, DIM, rotation=True),
    "simvq": q.SimVQConfig(16, DIM),
    "simvq, bias": q.SimVQConfig(16, DIM, 3, bias=True),
    "simvq, rotation": q.SimVQConfig(16, DIM, rotation=True),
    "fvq": q.FVQConfig(16, DIM, group=4, width=8, depth=1, heads=2),
    "ibq": q.IBQConfig(16, DIM, entropy_temperature=0.5),
    "ibq, unit": q.IBQConfig(16, DIM, 2.0, normalize=True),
    "lfq": q.LFQConfig(DIM, temperature=1.0),
    "lfq, groups": q.LFQConfig(DIM, groups=2, temperature=1.0, pool=True),
    "lfq, single bits": q.LFQConfig(DIM, order="msb_first", entropy_bits=1, temperature=1.0, codebook_term=True),
    "bsq": q.BSQConfig(DIM),
    "bsq, bits as ids": q.BSQConfig(DIM, groups=DIM, entropy_bits=2, scale_gradient=False),
    "fsq": q.FSQConfig((5, 4), DIM),
    "fsq, symmetric": q.FSQConfig((4, 3, 2, 5), DIM, "symmetric", project=False),
    "fsq, sigmoid": q.FSQConfig((5, 4), DIM, "sigmoid"),
    "shared index": q.SharedIndexConfig(16, (3, 1), (1.0, 2.0), entropy_temperature=0.1),
    "residual": q.ResidualConfig(q.VQConfig(16, DIM), 2),
    "multi-codebook": q.MultiCodebookConfig(q.VQConfig(16, DIM // 2, "unit"), 2),
    "multi-codebook, groups": q.MultiCodebookConfig(q.LFQConfig(DIM // 2, groups=2, temperature=1.0), 2),
    "per dimension": q.PerDimensionConfig(DIM),
    "per dimension, uniform": q.PerDimensionConfig(DIM, 4, -3.0, 3.0, "uniform"),
}

SCALES = {
    "scales": ("shared index", q.ScalesConfig()),
    "scales, VAR": ("vq", q.ScalesConfig(smoothing=q.SmoothingConfig(2), learning="by_sum")),
    "scales, Infinity": ("bsq, bits as ids", q.ScalesConfig(upsampling="bilinear")),
    "scales, residual": ("residual", q.ScalesConfig()),
}

MAKERS: dict[str, Callable[[], q.Quantizer]] = {
    **{name: (lambda config=config: q.build_quantizer(config)) for name, config in CONFIGS.items()},
    **{
        name: (
            lambda inner=inner, scales=scales: q.MultiScaleQuantizer(q.build_quantizer(CONFIGS[inner]), GRIDS, scales)
        )
        for name, (inner, scales) in SCALES.items()
    },
}
"""Features are [B, 2, 2, DIM] for all."""
