"""Chameleon's VQGAN (arXiv 2405.09818), which Anole, ARMOR and UnifiedVisual use too: `vqgan.ckpt`."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from tokenizers_mm._check import require
from tokenizers_mm.checkpoints.cnn import averaged, cnn_facts, read_vqgan, shape_of, taming_rules
from tokenizers_mm.checkpoints.family import Checkpoint, Family, check_description
from tokenizers_mm.checkpoints.upstream import Rule, within
from tokenizers_mm.models import Provenance
from tokenizers_mm.models.vqgan import VQGAN
from tokenizers_mm.quantizers import VQConfig

CODES = "quantize.embedding.weight"
PREFIX = "model.vqmodel."
"""Prefix of the tokenizer's tensors in a file of the whole model in transformers, of Anole for example."""

SOURCE = Provenance(
    source="facebook/chameleon-7b on the Hugging Face hub (tokenizer/vqgan.ckpt)",
    license="other",
    notice="The weights are under the Chameleon Research License: non-commercial research only.",
)


def rules_of(levels: int) -> list[Rule]:
    """Rules from our names to the published ones."""
    return [(r"^quantizer\.codes$", CODES), *taming_rules(levels)]


def convert(tensors: Mapping[str, Tensor], where: str, config: Mapping[str, Any] | None = None) -> VQGAN:
    """A tokenizer from tensors with the published names, alone or under `model.vqmodel.` beside a language model's."""
    tensors = averaged(within(tensors, (PREFIX,)), where, ema=True)
    decoder = any(name.startswith("decoder.") for name in tensors)
    require(decoder, where, "a tokenizer with its decoder, decoder.* (vqgan.ckpt has it)", "none")
    codes, dim = shape_of(tensors, CODES, where)
    tokenizer = read_vqgan(tensors, where, rules_of, VQConfig(codes, dim))
    check_description(config, {"n_embed": codes, "embed_dim": dim, **cnn_facts(tokenizer)})
    tokenizer.provenance = SOURCE
    return tokenizer


FAMILY = Family(
    convert,
    (
        Checkpoint(
            "facebook/chameleon-7b: tokenizer/vqgan.ckpt",
            (512, 512),
            ((1024, 1 << 13),),
            "Chameleon Research License",
            "transformers' class at a small size: ids (it has no decoder; the decoder is IBQ's, shown there); "
            "names, shapes and memory of the full size",
        ),
    ),
    names=("vqgan.ckpt", "tokenizer/vqgan.ckpt"),
    prefixes=(PREFIX,),
)
