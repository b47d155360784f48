"""TokenFlow's published checkpoints (arXiv 2412.03069): which model a file holds, and how its names become ours.

A file says neither its sizes nor its scales; names and shapes tell the variant, and `tokenflow_variants` holds the
rest. A size that was never published is described by `config`, in the form of the reference cases' config.json.
"""

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from tokenizers_mm._check import fail, require
from tokenizers_mm.checkpoints import upstream
from tokenizers_mm.checkpoints.family import Checkpoint, Family
from tokenizers_mm.checkpoints.tokenflow_variants import ENHANCED, PIXEL, VARIANTS, Description, variant_of
from tokenizers_mm.checkpoints.upstream import Link, Rule, Shape, get, link, take
from tokenizers_mm.config import checked
from tokenizers_mm.decoders.pixel import PixelDecoderConfig
from tokenizers_mm.decoders.semantic import SemanticDecoderConfig
from tokenizers_mm.encoders.pixel import PixelEncoderConfig
from tokenizers_mm.functional.positions import resize_positions
from tokenizers_mm.models import Provenance, TokenFlow, TokenFlowConfig
from tokenizers_mm.models.loading import build, fill
from tokenizers_mm.quantizers.shared_index import SharedIndexConfig

SOURCE = Provenance(source="ByteFlow-AI/TokenFlow on the Hugging Face hub", license="MIT")

USAGE_WINDOW = 131072
"""Length of the published buffer of recent ids, which is statistics only and is not kept."""

_PIXEL_RULES: list[Rule] = [
    (r"^pixel_encoder\.", "encoder."),
    (r"^pixel_decoder\.", "decoder."),
    (r"^(en|de)coder\.levels\.(\d+)\.blocks\.", r"\1coder.conv_blocks.\2.res."),
    (r"^(en|de)coder\.levels\.(\d+)\.attentions\.", r"\1coder.conv_blocks.\2.attn."),
    (r"^encoder\.levels\.(\d+)\.resample\.", r"encoder.conv_blocks.\1.downsample."),
    (r"^decoder\.levels\.(\d+)\.resample\.", r"decoder.conv_blocks.\1.upsample."),
    (r"^(en|de)coder\.middle\.block1\.", r"\1coder.mid.0."),
    (r"^(en|de)coder\.middle\.attention\.", r"\1coder.mid.1."),
    (r"^(en|de)coder\.middle\.block2\.", r"\1coder.mid.2."),
    (r"^((?:en|de)coder\..*)\.shortcut\.", r"\1.nin_shortcut."),
    (r"^((?:en|de)coder\..*)\.proj\.", r"\1.proj_out."),
    (r"^pixel_head\.", "quant_conv."),
    (r"^pixel_embed\.", "post_quant_conv."),
]
_SEMANTIC_RULES: list[Rule] = [
    (r"^semantic_head\.", "encode_task_layer."),
    (r"^semantic_decoder\.head\.", "decode_task_layer."),
    (r"^semantic_decoder\.norm\.", "decoder_vqkd.fc_norm."),
    (r"^semantic_decoder\.embed\.", "decoder_vqkd.patch_embed.proj."),
    (r"^semantic_decoder\.class_token$", "decoder_vqkd.cls_token"),
    (r"^semantic_decoder\.positions$", "decoder_vqkd.pos_embed"),
    (r"^semantic_decoder\.(.*)\.qkv\.bias$", (r"decoder_vqkd.\1.q_bias", None, r"decoder_vqkd.\1.v_bias")),
    (r"^semantic_decoder\.", "decoder_vqkd."),
    (r"^quantizer\.quantizer\.codebooks\.0$", "quantize.embedding_vqkd.weight"),
    (r"^quantizer\.quantizer\.codebooks\.1$", "quantize.embedding_vqgan.weight"),
    (r"^semantic_encoder\.tower\.", "encoder_vqkd."),
]


def convert(
    tensors: Mapping[str, Tensor], where: str, config: Mapping[str, Any] | None = None, *, image_size: int = 0
) -> TokenFlow:
    """A tokenizer from tensors with the published names.

    image_size: 224 or 256 for a CLIP checkpoint, which serves both; 0 takes what the original's scripts use: 256 with
    the enhanced decoder, 224 with the base one. The other variants have one size.
    """
    description = recognise(tensors, where, image_size) if config is None else config
    size = get(description, "dims.image_size")
    require(image_size in (0, size), "image_size", f"{size}, as the config has it", image_size)
    with upstream.description_errors():
        schema = checked(read_config(description))
    tokenizer = build(TokenFlow, schema)
    with upstream.description_errors():
        links = links_of(description, {name: tuple(t.shape) for name, t in tokenizer.state_dict().items()})
        unused = {"quantize.codebook_used": (USAGE_WINDOW,), **variant_of(description).unused(description)}
    fill(tokenizer, take(links, tensors, where, unused), where)
    _check_scaling(tensors, schema, where)
    tokenizer.provenance = Provenance(SOURCE.source, SOURCE.license, notice=_notice(description))
    return tokenizer.eval()  # type: ignore[return-value]


def recognise(tensors: Mapping[str, Tensor], where: str, image_size: int = 0) -> dict[str, Any]:
    """The description of a released variant, from names and shapes."""
    teacher = next((name for name, variant in VARIANTS.items() if variant.mark in tensors), None)
    codebook = tensors.get("quantize.embedding_vqkd.weight")
    if teacher is None or codebook is None:
        fail(where, f"the names of a TokenFlow checkpoint ({', '.join(VARIANTS)})", "names of another model")
    variant, enhanced = VARIANTS[teacher], "decoder.conv_blocks.0.res.4.conv1.weight" in tensors
    size = image_size or (variant.enhanced_size if enhanced else next(iter(variant.scales)))
    require(size in variant.scales, "image_size", " or ".join(map(str, variant.scales)), size)
    decoder = ENHANCED if enhanced else PIXEL
    return {
        "model_args": {"teacher": teacher, "codebook_size": codebook.shape[0]},
        "dims": {**variant.dims, "image_size": size, "pixel_encoder": PIXEL, "pixel_decoder": decoder},
        "scales": list(variant.scales[size]),
    }


def read_config(description: Description) -> TokenFlowConfig:
    """Our configuration of a model described as the reference cases describe theirs."""
    size, scales = get(description, "dims.image_size"), get(description, "scales")
    encoder, decoder = get(description, "dims.pixel_encoder"), get(description, "dims.pixel_decoder")
    codes, semantic = get(description, "model_args"), get(description, "dims.decoder_vqkd")
    grid, pixels = (scales[-1],) * 2, scales[-1] * 2 ** (len(encoder["ch_mult"]) - 1)
    return TokenFlowConfig(
        image_size=(size, size),
        scales=tuple((s, s) for s in scales),
        quantizer=SharedIndexConfig(
            get(description, "model_args.codebook_size"),
            (codes.get("semantic_code_dim", 32), codes.get("codebook_embed_dim", 8)),
        ),
        semantic_encoder=variant_of(description).tower(description, size),
        pixel_encoder=PixelEncoderConfig(out_channels=encoder["z_channels"], **_convolutions(encoder)),
        semantic_decoder=SemanticDecoderConfig(
            grid,
            get(description, "dims.semantic_recon_dim"),
            width=semantic["embed_dim"],
            depth=semantic["depth"],
            heads=semantic["num_heads"],
        ),
        pixel_decoder=PixelDecoderConfig(in_channels=decoder["z_channels"], **_convolutions(decoder)),
        pixel_size=None if pixels == size else (pixels, pixels),
    )


def links_of(description: Description, shapes: Mapping[str, Shape]) -> list[Link]:
    """Links from our names (with `shapes`) to the published ones, for state dicts and for gradients."""
    theirs: dict[str, Shape] = {
        name: (*shapes[name], 1, 1)  # 1x1 convolutions there
        for name in ("pixel_head.weight", "pixel_embed.weight", "semantic_decoder.embed.weight")
    }
    for name in ("semantic_encoder.tower.cls_token", "semantic_encoder.tower.pos_embed"):
        if name in shapes:
            theirs[name] = tuple(n for n in shapes[name] if n != 1)
    links = link(shapes, [*_PIXEL_RULES, *_SEMANTIC_RULES, *variant_of(description).rules], theirs)
    trained, grid = get(description, "dims.decoder_vqkd.grid_trained"), get(description, "scales")[-1]
    return links if trained == grid else [_resized(item, (trained, trained), (grid, grid)) for item in links]


def _convolutions(sizes: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "channels": sizes["ch"],
        "multipliers": tuple(sizes["ch_mult"]),
        "num_blocks": sizes["num_res_blocks"],
        "attention_levels": (len(sizes["ch_mult"]) - 1,),
    }


def _resized(item: Link, trained: tuple[int, int], grid: tuple[int, int]) -> Link:
    """The link of a position table that is interpolated from the grid it was trained on; others as they are."""
    if not item.ours.endswith((".pos_embed", ".positions")):
        return item
    count = 1 + trained[0] * trained[1]
    their_shape = tuple(count if n == item.shape[1] else n for n in item.their_shape)
    return Link(item.ours, item.shape, item.theirs, their_shape, partial(_interpolate, trained=trained, grid=grid))


def _interpolate(table: Tensor, trained: tuple[int, int], grid: tuple[int, int]) -> Tensor:
    return resize_positions(table.reshape(1, *table.shape[-2:]), trained, grid)


def _check_scaling(tensors: Mapping[str, Tensor], schema: TokenFlowConfig, where: str) -> None:
    """The input normalisation is a constant of the variant: a file with another one is another model."""
    for name, value in (("shift", schema.semantic_encoder.mean), ("scale", schema.semantic_encoder.std)):
        key = f"scaling_layer.{name}"
        if value is not None and not torch.allclose(tensors[key].flatten().float(), torch.tensor(value)):
            fail(f"{where}: {key}", str(value), str(tensors[key].flatten().tolist()))


def _notice(description: Description) -> str:
    """Notice of what the file leaves open, and how it was read."""
    sizes, size = variant_of(description).scales, get(description, "dims.image_size")
    if len(sizes) == 1:
        return ""
    return f"The checkpoint serves image sizes {' and '.join(map(str, sizes))}; it was read for {size} (image_size)."


_SHOWN = "the original code at small and at full size: ids, vectors, pixels, losses and gradients"

FAMILY = Family(
    convert,
    tuple(
        Checkpoint(
            f"ByteFlow-AI/TokenFlow: {file}", (size, size), ((sum(n * n for n in scales), 32768),), "MIT", _SHOWN
        )
        for file, teacher, size in (
            ("tokenflow_clipb_32k_enhanced.pt", "clipb_224", 256),
            ("tokenflow_siglip_32k.pt", "siglip_384", 384),
        )
        for scales in (VARIANTS[teacher].scales[size],)
    ),
)
