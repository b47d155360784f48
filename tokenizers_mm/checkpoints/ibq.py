"""IBQ's tokenizers (SEED-Voken, arXiv 2412.02692), and the tokenizer of Emu3.5, which has the same form."""

from collections.abc import Mapping
from functools import partial
from typing import Any

from torch import Tensor

from tokenizers_mm.checkpoints.cnn import averaged, cnn_facts, read_vqgan, shape_of, taming_rules
from tokenizers_mm.checkpoints.family import Checkpoint, Family, check_description
from tokenizers_mm.checkpoints.upstream import Rule
from tokenizers_mm.models import Provenance
from tokenizers_mm.models.vqgan import VQGAN
from tokenizers_mm.quantizers import IBQConfig

CODES = "quantize.embedding.weight"
SEED_VOKEN = Provenance(source="TencentARC/IBQ-Tokenizer-* on the Hugging Face hub", license="Apache-2.0")
EMU35 = Provenance(source="BAAI/Emu3.5-VisionTokenizer on the Hugging Face hub", license="Apache-2.0")


def rules_of(levels: int) -> list[Rule]:
    """Rules from our names to the published ones."""
    return [(r"^quantizer\.codes$", CODES), *taming_rules(levels)]


def read_ibq(
    provenance: Provenance,
    tensors: Mapping[str, Tensor],
    where: str,
    config: Mapping[str, Any] | None = None,
    *,
    ema: bool = True,
) -> VQGAN:
    """A tokenizer from tensors with the published names. ema: take the moving average where the file has one."""
    tensors = averaged(tensors, where, ema)
    codes, dim = shape_of(tensors, CODES, where)
    tokenizer = read_vqgan(tensors, where, rules_of, IBQConfig(codes, dim))
    check_description(config, {"n_embed": codes, "embed_dim": dim, **cnn_facts(tokenizer)})
    tokenizer.provenance = provenance
    return tokenizer


_SHOWN = "the original code at a small size: ids, vectors and pixels; names, shapes and memory of the full size"

IBQ_FAMILY = Family(
    partial(read_ibq, SEED_VOKEN),
    tuple(
        Checkpoint(
            f"TencentARC/IBQ-Tokenizer-{1 << bits}: imagenet256_{1 << bits}.ckpt",
            (256, 256),
            ((256, 1 << bits),),
            "Apache-2.0",
            _SHOWN,
        )
        for bits in (10, 13, 14, 18)
    ),
)
EMU35_FAMILY = Family(
    partial(read_ibq, EMU35),
    (Checkpoint("BAAI/Emu3.5-VisionTokenizer: model.ckpt", (256, 256), ((256, 1 << 17),), "Apache-2.0", _SHOWN),),
)
