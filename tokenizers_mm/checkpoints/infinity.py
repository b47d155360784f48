"""Infinity's bitwise multi-scale tokenizers (arXiv 2412.04431), which VARGPT-v1.1 uses too: `infinity_vae_d*.pth`.

A file does not say for which size of image it is read; `image_size` chooses it, and with it the grids.
"""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from tokenizers_mm._check import require
from tokenizers_mm.checkpoints.cnn import read_vqgan, shape_of, taming_rules
from tokenizers_mm.checkpoints.family import Checkpoint, Family, check_description
from tokenizers_mm.checkpoints.upstream import Rule, description_errors
from tokenizers_mm.models import Provenance
from tokenizers_mm.models.vqgan import VQGAN
from tokenizers_mm.quantizers import BSQConfig

SOURCE = Provenance(source="FoundationVision/Infinity on the Hugging Face hub", license="MIT")

SIDES = (1, 2, 4, 6, 8, 12, 16, 20, 24, 32, 40, 48, 64)
"""Sides of the square grids, coarse to fine; an image takes those up to its own."""

IMAGE_SIZES = (256, 512, 640, 1024)
"""Sides of the square images that the published models generate, and 640 in steps of the schedule."""


def rules_of(levels: int, infix: bool = True) -> list[Rule]:
    """Rules from our names to the published ones. infix: layers are kept inside a module called conv or norm."""
    wrapped: list[Rule] = [
        (r"\.(conv\w*|nin_shortcut|q|k|v|proj_out)\.(weight|bias)$", r".\1.conv.\2"),
        (r"\.(norm\w*)\.(weight|bias)$", r".\1.norm.\2"),
    ]
    return [*taming_rules(levels), *(wrapped if infix else [])]
