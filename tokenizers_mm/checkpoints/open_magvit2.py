"""Tokenizers with the networks of Open-MAGVIT2 (arXiv 2409.04410): its own, and BitDance's (arXiv 2602.14041)."""

from collections.abc import Mapping
from functools import partial
from typing import Any

from torch import Tensor

from tokenizers_mm._check import require
from tokenizers_mm.checkpoints.cnn import averaged, cnn_facts, magvit_rules, read_vqgan, shape_of
from tokenizers_mm.checkpoints.family import Checkpoint, Family, check_description
from tokenizers_mm.models import Provenance
from tokenizers_mm.models.vqgan import VQGAN
from tokenizers_mm.quantizers import LFQConfig

OPEN_MAGVIT2 = Provenance(source="TencentARC/Open-MAGVIT2-Tokenizer-* on the Hugging Face hub", license="Apache-2.0")
BITDANCE = Provenance(source="shallowdream204/BitDance-Tokenizer on the Hugging Face hub", license="Apache-2.0")
BITS = "encoder.conv_out.weight"


def convert(
    tensors: Mapping[str, Tensor], where: str, config: Mapping[str, Any] | None = None, *, ema: bool = True
) -> VQGAN:
    """Open-MAGVIT2's tokenizer. ema: take the moving average where the file has one."""
    tensors = averaged(tensors, where, ema)
    bits = shape_of(tensors, BITS, where)[0]
    tokenizer = read_vqgan(tensors, where, magvit_rules, LFQConfig(bits), resampling="shuffle")
    check_description(config, {"n_embed": 1 << bits, "embed_dim": bits, **cnn_facts(tokenizer)})
    tokenizer.provenance = OPEN_MAGVIT2
    return tokenizer
