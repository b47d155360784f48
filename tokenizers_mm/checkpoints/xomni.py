"""X-Omni's SigLIP-VQ (arXiv 2507.22058), which GvU uses too: SigLIP2's tower, quantized; it has no pixels.

Two files: the tower's, with the names of timm, and that of the projector around the quantizer. The decoder of features
is the projector's; X-Omni's images are made from them by a diffusion model.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from tokenizers_mm._check import require
from tokenizers_mm.checkpoints import upstream
from tokenizers_mm.checkpoints.cnn import shape_of, shapes_of
from tokenizers_mm.checkpoints.family import Checkpoint, Family, check_description
from tokenizers_mm.checkpoints.glm_image import HEADS, read_tower
from tokenizers_mm.checkpoints.upstream import Link, Rule, Shape, get, link, take
from tokenizers_mm.config import checked, read_json
from tokenizers_mm.decoders.features import ConvFeatureConfig
from tokenizers_mm.models import Provenance
from tokenizers_mm.models.loading import build, fill
from tokenizers_mm.models.semantic import SemanticConfig, SemanticTokenizer
from tokenizers_mm.quantizers import IBQConfig

SOURCE = Provenance(source="X-Omni/X-Omni-En on the Hugging Face hub", license="Apache-2.0")

POOLING = ("norm.", "attn_pool.", "fc_norm.", "head.")
"""Parts of a SigLIP tower behind its last block, which the original code reads over."""

CODES = "quantize.embedding.weight"

_RULES: list[Rule] = [
    (r"^head\.", "quant_conv."),
    (r"^semantic_decoder\.embed\.", "post_quant_conv."),
    (r"^semantic_decoder\.blocks\.", "post_conv."),
    (r"^quantizer\.codes$", CODES),
    (r"^tower\.embed\.", "patch_embed.proj."),
    (r"^tower\.positions$", "pos_embed"),
    (r"^tower\.", ""),
]


def convert(
    tensors: Mapping[str, Tensor], where: str, config: Mapping[str, Any] | None = None, *, projector: str = ""
) -> SemanticTokenizer:
    """A tokenizer from the tower's file.

    projector: path of the file with the quantizer; the config.json of a downloaded folder names both files.
    config: `num_heads` of an unpublished tower.
    """
    require(bool(projector), "projector", "the path of the file with the quantizer (there are two files)", "nothing")
    tower = {name: t for name, t in tensors.items() if not name.startswith(POOLING)}
    around = upstream.read(projector)
    twice = sorted(tower.keys() & around.keys())
    require(not twice, projector, f"other tensors than {where}", f"{twice[:3]}")
    heads = HEADS if config is None or "num_heads" not in config else config["num_heads"]
    vit = read_tower(tower, where, "", "pos_embed", 3, heads=heads)
    codes, dim = shape_of(around, CODES, projector)
    depth = sum(name.startswith("post_conv.") and name.endswith(".conv1.weight") for name in around)
    quantizer = IBQConfig(codes, dim, temperature=2.0, normalize=True)
    schema = SemanticConfig(vit, quantizer, cell=vit.patch, semantic_decoder=ConvFeatureConfig(depth=depth))
    tokenizer = build(SemanticTokenizer, checked(schema))
    links = links_of(shapes_of(tokenizer.state_dict()))
    fill(tokenizer, take(links, {**tower, **around}, where), where)
    check_description(config, {"codebook_size": codes, "codebook_dim": dim, "z_channels": vit.width})
    tokenizer.provenance = SOURCE
    return tokenizer.eval()  # type: ignore[return-value]


def parts(folder: Path) -> tuple[Path, dict[str, Any]]:
    """The tower's file and the option `projector`, as config.json of a downloaded folder names them."""
    paths = {}
    for key in ("siglip_path", "projector_path"):
        name = get(read_json(folder / "config.json"), f"vision_config.encoder.{key}")
        inside = isinstance(name, str) and not Path(name).is_absolute() and ".." not in Path(name).parts
        require(inside, f"{folder / 'config.json'}: {key}", "the name of a file of the folder", name)
        paths[key] = folder / name
    return paths["siglip_path"], {"projector": paths["projector_path"]}


def links_of(shapes: Mapping[str, Shape]) -> list[Link]:
    """Links from our names to those of both files."""
    return link(shapes, _RULES, {"head.weight": (*shapes["head.weight"], 1, 1)})


FAMILY = Family(
    convert,
    (
        Checkpoint(
            "X-Omni/X-Omni-En: the SigLIP2 tower's file (projector: that of its config.json)",
            (512, 512),
            ((1024, 1 << 14),),
            "Apache-2.0",
            "the original code at a small size: features, ids and vectors; names, shapes and memory of the full size",
        ),
    ),
    parts=parts,
)
