"""Infinity's bitwise multi-scale tokenizers (arXiv 2412.04431), which VARGPT-v1.1 uses too: `infinity_vae_d*.pth`.

A file does not say for which size of image it is read; `image_size` chooses it, and with it the grids.
"""

from collections.abc import Mapping
from functools import partial
from typing import Any

from torch import Tensor

from tokenizers_mm._check import require
from tokenizers_mm.checkpoints.cnn import read_vqgan, shape_of, taming_rules
from tokenizers_mm.checkpoints.family import Checkpoint, Family, check_description
from tokenizers_mm.checkpoints.upstream import Rule, description_errors
from tokenizers_mm.functional.bits import MAX_BITS
from tokenizers_mm.models import Provenance
from tokenizers_mm.models.vqgan import VQGAN
from tokenizers_mm.quantizers import BSQConfig
from tokenizers_mm.quantizers.multiscale import INFINITY_SCALES

SOURCE = Provenance(source="FoundationVision/Infinity on the Hugging Face hub", license="MIT")

SIDES = (1, 2, 4, 6, 8, 12, 16, 20, 24, 32, 40, 48, 64)
"""Sides of the square grids, coarse to fine; an image takes those up to its own."""

FACTOR = 16
"""Pixels per cell and side."""

MASKS = ("quantize.lfq.mask", "quantizer.lfq.mask")
"""Published buffers with the powers of two, one tensor under two names."""


def rules_of(levels: int, infix: bool = True) -> list[Rule]:
    """Rules from our names to the published ones. infix: layers are kept inside a module called conv or norm."""
    wrapped: list[Rule] = [
        (r"\.(conv\w*|nin_shortcut|q|k|v|proj_out)\.(weight|bias)$", r".\1.conv.\2"),
        (r"\.(norm\w*)\.(weight|bias)$", r".\1.norm.\2"),
    ]
    return [*taming_rules(levels), *(wrapped if infix else [])]


def grids_of(image_size: int) -> list[tuple[int, int]]:
    """Square grids of a square image."""
    side = image_size // FACTOR
    require(
        image_size % FACTOR == 0 and side in SIDES, "image_size", f"one of {[FACTOR * n for n in SIDES]}", image_size
    )
    return [(n, n) for n in SIDES if n <= side]


def convert(
    tensors: Mapping[str, Tensor], where: str, config: Mapping[str, Any] | None = None, *, image_size: int = 1024
) -> VQGAN:
    """A tokenizer from tensors with the published names.

    image_size: side of the images; the published models draw 256, 512 and 1024. `config` may give any scales
    ("scale_schedule", entries (1, rows, columns) from coarse to fine) in their place.
    """
    infix = any(name.startswith(("encoder.conv_in.conv.", "encoder.conv_out.conv.")) for name in tensors)
    dim = shape_of(tensors, f"encoder.conv_out{'.conv' if infix else ''}.weight", where, 4)[0]
    with description_errors():
        schedule = (config or {}).get("scale_schedule")
        scales = grids_of(image_size) if schedule is None else [(rows, columns) for _, rows, columns in schedule]
    unused = {name: (dim,) for name in MASKS if name in tensors}
    quantizer = BSQConfig(dim, 1 if dim <= MAX_BITS else 2, scale_gradient=False)
    rules = partial(rules_of, infix=infix)
    tokenizer = read_vqgan(tensors, where, rules, quantizer, scales=scales, multiscale=INFINITY_SCALES, unused=unused)
    encoder, decoder = tokenizer.config.encoder, tokenizer.config.decoder
    check_description(
        config,
        {
            "base_ch": encoder.channels,
            "encoder_ch_mult": encoder.multipliers,
            "decoder_ch_mult": decoder.multipliers,
            "codebook_dim": dim,
        },
    )
    tokenizer.provenance = SOURCE
    return tokenizer


FAMILY = Family(
    convert,
    tuple(
        Checkpoint(
            f"FoundationVision/Infinity: infinity_vae_{name}.pth",
            (1024, 1024),
            ((groups * sum(n * n for n in SIDES), 1 << (bits // groups)),),
            "MIT",
            "the original code at a small size: bits, vectors and pixels; "
            "names, shapes and memory of the full size (d32)",
        )
        for name, bits, groups in (("d16", 16, 1), ("d24", 24, 1), ("d32", 32, 1), ("d32reg", 32, 1), ("d64", 64, 2))
    ),
    wrappers=("vae", "ema"),
)
