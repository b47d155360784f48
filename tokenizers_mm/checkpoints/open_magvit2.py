"""Tokenizers with the networks of Open-MAGVIT2 (arXiv 2409.04410): its own, and BitDance's (arXiv 2602.14041)."""

from collections.abc import Mapping
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
"""Tensor with one row for each bit."""

GROUP = 8
"""Bits of an id of BitDance's tokenizers here; the original's models read bits, not ids."""


def convert(
    tensors: Mapping[str, Tensor], where: str, config: Mapping[str, Any] | None = None, *, ema: bool = True
) -> VQGAN:
    """Open-MAGVIT2's tokenizer. ema: take the moving average where the file has one."""
    tensors = averaged(tensors, where, ema)
    bits = shape_of(tensors, BITS, where, 4)[0]
    tokenizer = read_vqgan(tensors, where, magvit_rules, LFQConfig(bits), resampling="shuffle")
    check_description(config, {"n_embed": 1 << bits, "embed_dim": bits, **cnn_facts(tokenizer)})
    tokenizer.provenance = OPEN_MAGVIT2
    return tokenizer


def convert_bitdance(tensors: Mapping[str, Tensor], where: str, config: Mapping[str, Any] | None = None) -> VQGAN:
    """BitDance's tokenizer; its bits are packed into ids of 8, first channel lowest.

    The decoder of a file trained with noise beside the codes takes more channels than there are bits: it is refused.
    """
    bits = shape_of(tensors, BITS, where, 4)[0]
    taken = shape_of(tensors, "decoder.conv_in.weight", where, 4)[1]
    expected = f"{bits} channels, as {BITS} has (no noise input)"
    require(taken == bits, f"{where}: decoder.conv_in.weight", expected, f"{taken}")
    require(bits % GROUP == 0, f"{where}: {BITS}", f"a multiple of {GROUP} bits", bits)
    quantizer = LFQConfig(bits, bits // GROUP, pool=True)
    tokenizer = read_vqgan(tensors, where, magvit_rules, quantizer, resampling="shuffle")
    check_description(config, cnn_facts(tokenizer))
    tokenizer.provenance = BITDANCE
    return tokenizer


_SHOWN = "the original code at a small size: ids, vectors and pixels; names, shapes and memory of the full size"

OPEN_MAGVIT2_FAMILY = Family(
    convert,
    (
        Checkpoint(
            "TencentARC/Open-MAGVIT2-Tokenizer-256-resolution: imagenet_256_L.ckpt",
            (256, 256),
            ((256, 1 << 18),),
            "Apache-2.0",
            _SHOWN,
        ),
        Checkpoint(
            "TencentARC/Open-MAGVIT2-Tokenizer-128-resolution: imagenet_128_L.ckpt",
            (128, 128),
            ((256, 1 << 18),),
            "Apache-2.0",
            _SHOWN,
        ),
        Checkpoint(
            "TencentARC/Open-MAGVIT2-Tokenizer-262144-Pretrain: pretrain256_262144.ckpt",
            (256, 256),
            ((256, 1 << 18),),
            "Apache-2.0",
            _SHOWN,
        ),
        Checkpoint(
            "TencentARC/Open-MAGVIT2-Tokenizer-16384-Pretrain: pretrain256_16384.ckpt",
            (256, 256),
            ((256, 1 << 14),),
            "Apache-2.0",
            _SHOWN,
        ),
    ),
)
_BITDANCE = "the original code at a small size: bits and pixels; names, shapes and memory of the full size (d16c32)"

BITDANCE_FAMILY = Family(
    convert_bitdance,
    (
        Checkpoint(
            "shallowdream204/BitDance-Tokenizer: ae_d16c32.safetensors",
            (256, 256),
            ((4 * 256, 1 << GROUP),),
            "Apache-2.0",
            _BITDANCE,
        ),
        Checkpoint(
            "shallowdream204/BitDance-Tokenizer: ae_d32c128.safetensors",
            (256, 256),
            ((16 * 64, 1 << GROUP),),
            "Apache-2.0",
            _BITDANCE,
        ),
        Checkpoint(
            "shallowdream204/BitDance-Tokenizer: ae_d32c256.safetensors",
            (256, 256),
            ((32 * 64, 1 << GROUP),),
            "Apache-2.0",
            _BITDANCE,
        ),
    ),
    names=("ae.safetensors",),
)
