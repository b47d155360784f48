"""The image tokenizer of Apertus 1.5 in transformers: Emu3.5's encoder and codebook, without a decoder.

The decoder, which transformers leaves out, is read from a file of Emu3.5's tokenizer with the same codebook.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from tokenizers_mm._check import require
from tokenizers_mm.checkpoints import upstream
from tokenizers_mm.checkpoints.cnn import averaged, read_vqgan, shape_of
from tokenizers_mm.checkpoints.family import Checkpoint, Family, check_description
from tokenizers_mm.checkpoints.ibq import CODES
from tokenizers_mm.checkpoints.ibq import rules_of as emu_rules_of
from tokenizers_mm.checkpoints.upstream import Rule
from tokenizers_mm.models import Provenance
from tokenizers_mm.models.vqgan import VQGAN
from tokenizers_mm.quantizers import IBQConfig

SOURCE = Provenance(
    source="swiss-ai/Apertus-v1.5-8B on the Hugging Face hub; decoder: BAAI/Emu3.5-VisionTokenizer",
    license="Apache-2.0",
    notice="The publisher of Apertus asks for agreement to its Acceptable Use Policy before the download.",
)
PREFIXES = ("model.vision_tokenizer.", "vision_tokenizer.")
"""Prefixes of the tokenizer's tensors in a file of the whole language model."""


ROWS = 1024
"""Codes that are compared at a time."""


def rules_of(levels: int) -> list[Rule]:
    """Rules from our names to those of transformers for the encoder, and of Emu3.5 for the decoder."""
    return [
        (r"^encoder\.levels\.(\d+)\.blocks\.(\d+)\.", r"encoder.stages.\1.layers.\2.resnet."),
        (r"^encoder\.levels\.(\d+)\.attentions\.(\d+)\.", r"encoder.stages.\1.layers.\2.attention."),
        (r"^encoder\.levels\.(\d+)\.resample\.", r"encoder.stages.\1.downsample."),
        *emu_rules_of(levels),
    ]


def convert(
    tensors: Mapping[str, Tensor], where: str, config: Mapping[str, Any] | None = None, *, decoder: str = ""
) -> VQGAN:
    """A tokenizer from a file of Apertus 1.5, or of its image tokenizer alone.

    decoder: path of Emu3.5's `model.ckpt`, or of a folder with it; its codebook must be that of the file, up to
    rounding.
    """
    tensors = upstream.within(tensors, PREFIXES)
    require(bool(decoder), "decoder", "the path of Emu3.5's model.ckpt (the file itself holds no decoder)", "nothing")
    other = averaged(upstream.read(decoder), decoder, ema=True)
    codes, dim = shape_of(tensors, CODES, where)
    require(
        shape_of(other, CODES, decoder) == (codes, dim),
        "decoder",
        f"codes [{codes}, {dim}]",
        shape_of(other, CODES, decoder),
    )
    require(_near(tensors[CODES], other[CODES]), "decoder", f"the codebook of {where}", "another one")
    taken = {name: t for name, t in other.items() if name.startswith(("decoder.", "post_quant_conv."))}
    tokenizer = read_vqgan({**tensors, **taken}, where, rules_of, IBQConfig(codes, dim))
    check_description(config, {"codebook_size": codes, "embed_dim": dim})
    tokenizer.provenance = SOURCE
    return tokenizer


def _near(codes: Tensor, others: Tensor) -> bool:
    """True if two codebooks are equal up to rounding; in blocks of rows, which need little memory."""
    limit = 1e-2 * max(-float(others.min()), float(others.max()))
    blocks = zip(codes.split(ROWS), others.split(ROWS), strict=True)
    return all(torch.allclose(a.float(), b.float(), rtol=1e-2, atol=limit) for a, b in blocks)


FAMILY = Family(
    convert,
    (
        Checkpoint(
            "swiss-ai/Apertus-v1.5-8B (vision_tokenizer.*)",
            (256, 256),
            ((256, 1 << 17),),
            "Apache-2.0",
            "transformers' class at a small size: ids (it has no decoder; Emu3.5's is shown there); "
            "names, shapes and memory of the full size",
        ),
    ),
    prefixes=PREFIXES,
)
