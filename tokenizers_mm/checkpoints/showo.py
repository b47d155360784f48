"""Show-o's MAGVIT-v2 tokenizer (arXiv 2408.12528), which MMaDA uses too: `showlab/magvitv2`."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from tokenizers_mm.checkpoints.cnn import cnn_facts, read_vqgan, shape_of, taming_rules
from tokenizers_mm.checkpoints.family import Checkpoint, Family, check_description
from tokenizers_mm.checkpoints.upstream import Rule
from tokenizers_mm.models import Provenance
from tokenizers_mm.models.vqgan import VQGAN
from tokenizers_mm.quantizers import LFQConfig

SOURCE = Provenance(source="showlab/magvitv2 on the Hugging Face hub", license="MIT")


def rules_of(levels: int) -> list[Rule]:
    """Rules from our names to the published ones."""
    return [
        (r"^head\.", "encoder.quant_conv."),
        (r"^embed\.", "decoder.post_quant_conv."),
        *taming_rules(levels),
    ]


def convert(tensors: Mapping[str, Tensor], where: str, config: Mapping[str, Any] | None = None) -> VQGAN:
    """A tokenizer from tensors with the published names."""
    bits = shape_of(tensors, "encoder.quant_conv.weight", where, 4)[0]
    table = {"quantize.embedding": (1 << bits, bits), "quantize.power_vals": (bits,)}  # follow from the bits
    tokenizer = read_vqgan(
        tensors,
        where,
        rules_of,
        LFQConfig(bits, order="msb_first", entropy_bits=1, temperature=1.0, eps=1e-8, codebook_term=True),
        unused=table,
    )
    check_description(config, {"codebook_dim": bits, **cnn_facts(tokenizer, "encoder.")})
    tokenizer.provenance = SOURCE
    return tokenizer


FAMILY = Family(
    convert,
    (
        Checkpoint(
            "showlab/magvitv2: pytorch_model.bin",
            (256, 256),
            ((256, 1 << 13),),
            "MIT",
            "the original code at a small size: ids, vectors and pixels; names, shapes and memory of the full size",
        ),
    ),
)
