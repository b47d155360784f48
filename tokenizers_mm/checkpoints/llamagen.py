"""LlamaGen's VQ tokenizers (arXiv 2406.06525), and the one of Janus and Janus-Pro, which has the same form."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from tokenizers_mm.checkpoints.cnn import cnn_facts, read_vqgan, shape_of, taming_rules
from tokenizers_mm.checkpoints.family import Checkpoint, Family, check_description
from tokenizers_mm.checkpoints.upstream import Rule, within
from tokenizers_mm.models import Provenance
from tokenizers_mm.models.vqgan import VQGAN
from tokenizers_mm.quantizers import VQConfig

CODES = "quantize.embedding.weight"
LLAMAGEN = Provenance(source="FoundationVision/LlamaGen on the Hugging Face hub", license="MIT")
JANUS = Provenance(
    source="deepseek-ai/Janus-Pro-1B on the Hugging Face hub",
    license="other",
    notice="The weights are under the DeepSeek Model License, which restricts uses.",
)
USAGE_WINDOW = 65536
"""Length of the published buffer of recent ids, which is statistics only and is not kept."""

JANUS_PREFIXES = ("gen_vision_model.", "model.vqmodel.")
"""Prefixes of the tokenizer's tensors in a file of the language model: as published, and as transformers has it."""


def rules_of(levels: int) -> list[Rule]:
    """Rules from our names to the published ones, which count the decoder's levels from coarse to fine."""
    return [
        (r"^quantizer\.codes$", CODES),
        (r"\.levels\.", ".conv_blocks."),
        (r"\.blocks\.", ".res."),
        (r"\.middle\.block1\.", ".mid.0."),
        (r"\.middle\.attention\.", ".mid.1."),
        (r"\.middle\.block2\.", ".mid.2."),
        *taming_rules(levels),
    ]


def transformers_rules_of(levels: int) -> list[Rule]:
    """Rules to the names of Janus in transformers, which counts the decoder's levels from coarse to fine."""
    return [
        (r"^quantizer\.codes$", CODES),
        (r"^decoder\.levels\.", "decoder.up."),
        *taming_rules(levels),
    ]


def convert(tensors: Mapping[str, Tensor], where: str, config: Mapping[str, Any] | None = None) -> VQGAN:
    """LlamaGen's tokenizer from tensors with the published names."""
    codes, dim = shape_of(tensors, CODES, where)
    unused = {name: (USAGE_WINDOW,) for name in ("quantize.codebook_used",) if name in tensors}
    tokenizer = read_vqgan(tensors, where, rules_of, VQConfig(codes, dim, distance="unit"), unused=unused)
    check_description(config, {"codebook_size": codes, "codebook_embed_dim": dim, **cnn_facts(tokenizer)})
    tokenizer.provenance = LLAMAGEN
    return tokenizer


def convert_janus(tensors: Mapping[str, Tensor], where: str, config: Mapping[str, Any] | None = None) -> VQGAN:
    """Janus's tokenizer from a file of the whole model or of the tokenizer alone, as published or of transformers."""
    tensors = within(tensors, JANUS_PREFIXES)
    published = any(".conv_blocks." in name for name in tensors)
    codes, dim = shape_of(tensors, CODES, where)
    unused = {name: (USAGE_WINDOW,) for name in ("quantize.codebook_used",) if name in tensors}
    rules = rules_of if published else transformers_rules_of
    tokenizer = read_vqgan(tensors, where, rules, VQConfig(codes, dim, distance="unit"), unused=unused)
    check_description(config, {"num_embeddings": codes, "embed_dim": dim})
    tokenizer.provenance = JANUS
    return tokenizer


_SHOWN = "the original code at a small size: ids and pixels; names, shapes and memory of the full size"
_JANUS = (
    "transformers' class at a small size: ids and pixels; names of the original, which are LlamaGen's; "
    "names, shapes and memory of the full size"
)

LLAMAGEN_FAMILY = Family(
    convert,
    (
        Checkpoint(
            "FoundationVision/LlamaGen: vq_ds16_c2i.pt", (256, 256), ((256, 1 << 14),), LLAMAGEN.license, _SHOWN
        ),
        Checkpoint(
            "FoundationVision/LlamaGen: vq_ds16_t2i.pt", (512, 512), ((1024, 1 << 14),), LLAMAGEN.license, _SHOWN
        ),
        Checkpoint(
            "FoundationVision/LlamaGen: vq_ds8_c2i.pt", (256, 256), ((1024, 1 << 14),), LLAMAGEN.license, _SHOWN
        ),
    ),
)
JANUS_FAMILY = Family(
    convert_janus,
    (
        Checkpoint(
            "deepseek-ai/Janus-Pro-1B: pytorch_model.bin",
            (384, 384),
            ((576, 1 << 14),),
            "DeepSeek Model License",
            _JANUS,
        ),
        Checkpoint(
            "deepseek-community/Janus-Pro-1B: model.safetensors",
            (384, 384),
            ((576, 1 << 14),),
            "DeepSeek Model License",
            _JANUS,
        ),
    ),
    prefixes=JANUS_PREFIXES,
)
