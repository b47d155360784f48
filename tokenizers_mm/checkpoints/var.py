"""VAR's multi-scale VQVAE (arXiv 2404.02905), which VARGPT uses too: `vae_ch160v4096z32.pth`."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from tokenizers_mm.checkpoints.cnn import joined_attention, read_vqgan, shape_of, taming_rules
from tokenizers_mm.checkpoints.family import Checkpoint, Family, check_description
from tokenizers_mm.checkpoints.upstream import Rule, description_errors
from tokenizers_mm.models import Provenance
from tokenizers_mm.models.vqgan import VQGAN
from tokenizers_mm.quantizers import VQConfig
from tokenizers_mm.quantizers.multiscale import VAR_SCALES

SOURCE = Provenance(source="FoundationVision/var on the Hugging Face hub", license="MIT")
CODES = "quantize.embedding.weight"
SIDES = (1, 2, 3, 4, 5, 6, 8, 10, 13, 16)
"""Sides of the square grids at 256 x 256 pixels, coarse to fine."""


def rules_of(levels: int) -> list[Rule]:
    """Rules from our names to the published ones."""
    return [
        (r"^quantizer\.quantizer\.codes$", CODES),
        (r"^quantizer\.smoothing\.convolutions\.", "quantize.quant_resi.qresi_ls."),
        *taming_rules(levels),
    ]


def convert(tensors: Mapping[str, Tensor], where: str, config: Mapping[str, Any] | None = None) -> VQGAN:
    """A tokenizer from tensors with the published names; `config` may give other scales ("patch_nums")."""
    codes, dim = shape_of(tensors, CODES, where)
    with description_errors():
        scales = [(side, side) for side in (config or {}).get("patch_nums", SIDES)]
    unused = {"quantize.ema_vocab_hit_SV": (len(scales), codes)}  # statistics
    tokenizer = read_vqgan(
        tensors,
        where,
        rules_of,
        VQConfig(codes, dim),
        scales=scales,
        multiscale=VAR_SCALES,
        unused=unused,
        adjust=joined_attention,
    )
    check_description(config, {"vocab": codes, "Cvae": dim})
    tokenizer.provenance = SOURCE
    return tokenizer


FAMILY = Family(
    convert,
    (
        Checkpoint(
            "FoundationVision/var: vae_ch160v4096z32.pth",
            (256, 256),
            ((sum(n * n for n in SIDES), 1 << 12),),
            "MIT",
            "the original code at a small size: ids, vectors and pixels; names, shapes and memory of the full size",
        ),
    ),
)
