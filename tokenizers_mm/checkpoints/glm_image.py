"""The image tokenizer of GLM-Image as transformers has it: a vision tower, quantized; it has no pixels.

The decoder of its features is the pointwise convolution behind the quantizer; the images of GLM-Image are made from the
codes by a diffusion model.
"""

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from tokenizers_mm._check import require
from tokenizers_mm.checkpoints.cnn import shape_of, shapes_of
from tokenizers_mm.checkpoints.family import Checkpoint, Family, check_description
from tokenizers_mm.checkpoints.upstream import FILES, Link, Rule, Shape, description_errors, link, take
from tokenizers_mm.config import checked, read_json
from tokenizers_mm.decoders.features import ConvFeatureConfig
from tokenizers_mm.encoders.plain_vit import PlainViTConfig
from tokenizers_mm.encoders.semantic import CLIP_MEAN, CLIP_STD
from tokenizers_mm.models import Provenance
from tokenizers_mm.models.loading import build, fill
from tokenizers_mm.models.semantic import SemanticConfig, SemanticTokenizer
from tokenizers_mm.quantizers import IBQConfig

SOURCE = Provenance(
    source="zai-org/GLM-Image on the Hugging Face hub",
    license="Apache-2.0",
    notice="By its model card GLM-Image is under the MIT License, but tower and codes are X-Omni's, under Apache-2.0.",
)

HEADS = 16
"""Attention heads of the published tower, which names and shapes do not tell."""

PARTS = ("visual.", "vqmodel.")
"""Prefixes of the two parts in a file of the whole language model, behind `model.`."""

_RULES: list[Rule] = [
    (r"^head\.", "vqmodel.quant_conv."),
    (r"^semantic_decoder\.embed\.", "vqmodel.post_quant_conv."),
    (r"^quantizer\.codes$", "vqmodel.quantize.embedding.weight"),
    (r"^tower\.embed\.", "visual.patch_embed.proj."),
    (r"^tower\.positions$", "visual.embeddings.position_embedding.weight"),
    (r"^tower\.", "visual."),
]


def convert(
    tensors: Mapping[str, Tensor], where: str, config: Mapping[str, Any] | None = None, *, processor: str = ""
) -> SemanticTokenizer:
    """A tokenizer from a file of the whole model, or of its tower and quantizer alone.

    processor: path of its preprocessor_config.json, whose `image_mean` and `image_std` are taken; by default those of
    transformers' image processor. A downloaded folder holds it. config: the same two, which go before, and `num_heads`
    of an unpublished tower.
    """
    found = read_json(Path(processor)) if processor else {}
    config = {**{key: found[key] for key in ("image_mean", "image_std") if key in found}, **(config or {})}
    prefix = "model." if any(name.startswith("model.visual.") for name in tensors) else ""
    kept = tuple(prefix + part for part in PARTS)
    tensors = {name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(kept)}
    with description_errors():
        schema = checked(read_config(tensors, where, config))
    tokenizer = build(SemanticTokenizer, schema)
    links = links_of(shapes_of(tokenizer.state_dict()))
    fill(tokenizer, take(links, tensors, where), where)
    check_description(config, {"num_embeddings": tokenizer.config.quantizer.codebook_size})
    tokenizer.provenance = SOURCE
    return tokenizer.eval()  # type: ignore[return-value]


def parts(folder: Path) -> tuple[Path, dict[str, Any]]:
    """The folder itself, and the option `processor` where it holds the settings of the image processor."""
    settings = folder / "processor" / "preprocessor_config.json"
    return folder, {"processor": str(settings)} if settings.is_file() else {}


def links_of(shapes: Mapping[str, Shape]) -> list[Link]:
    """Links from our names to those of transformers."""
    theirs: dict[str, Shape] = {"head.weight": (*shapes["head.weight"], 1, 1)}
    theirs["tower.positions"] = shapes["tower.positions"][1:]
    return link(shapes, _RULES, theirs)


def read_config(tensors: Mapping[str, Tensor], where: str, config: Mapping[str, Any]) -> SemanticConfig:
    """Our configuration, from shapes."""
    tower = read_tower(
        tensors,
        where,
        "visual.",
        "visual.embeddings.position_embedding.weight",
        heads=config.get("num_heads", HEADS),
        mean=tuple(config.get("image_mean", CLIP_MEAN)),
        std=tuple(config.get("image_std", CLIP_STD)),
    )
    codes, dim = shape_of(tensors, "vqmodel.quantize.embedding.weight", where)
    quantizer = IBQConfig(codes, dim, temperature=2.0, normalize=True)
    return SemanticConfig(tower, quantizer, cell=tower.patch, semantic_decoder=ConvFeatureConfig(depth=0))


def read_tower(
    tensors: Mapping[str, Tensor], where: str, prefix: str, positions: str, axes: int = 2, **known: Any
) -> PlainViTConfig:
    """Sizes of a vision transformer whose blocks have the names of timm.

    positions: name of its table, [N, C] or, with 3 axes, [1, N, C]. known: what no shape tells.
    """
    embed = f"{prefix}patch_embed.proj"
    width, _, patch, _ = shape_of(tensors, f"{embed}.weight", where, 4)
    channels = shape_of(tensors, f"{embed}.bias", where, 1)[0]
    require(channels == width, f"{where}: {embed}.weight", f"{channels} channels, as {embed}.bias has", width)
    count = shape_of(tensors, positions, where, axes)[-2]
    side = math.isqrt(count)
    require(side * side == count, f"{where}: {positions}", "a square grid of positions", f"{count}")
    found = (re.match(rf"{re.escape(prefix)}blocks\.(\d+)\.", name) for name in tensors)
    depth = 1 + max((int(match[1]) for match in found if match), default=-1)
    hidden = shape_of(tensors, f"{prefix}blocks.0.mlp.fc1.weight", where)[0] if depth else 4 * width
    sizes: dict[str, Any] = {"positions": (side, side), "mlp_ratio": hidden / width}
    return PlainViTConfig(patch=patch, width=width, depth=depth, **sizes, **known)


FAMILY = Family(
    convert,
    (
        Checkpoint(
            "zai-org/GLM-Image (model.visual.*, model.vqmodel.*)",
            (512, 512),
            ((1024, 1 << 14),),
            "Apache-2.0",
            "transformers' classes at a small size: features, ids and vectors; "
            "names, shapes and memory of the full size",
        ),
    ),
    names=tuple(f"vision_language_encoder/{name}" for name in FILES),
    prefixes=tuple(f"model.{part}" for part in PARTS),
    parts=parts,
)
