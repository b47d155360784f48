"""Published checkpoints around MAR: `kl16.ckpt`, MAR's own `.pth` and Harmon's.

MAR's and Harmon's files hold no autoencoder; `kl16.ckpt`, which comes with MAR, is read beside them. All sizes follow
from names and shapes, but for the number of heads, which only the three published widths tell.
"""

import math
import re
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from tokenizers_mm._check import fail, require
from tokenizers_mm.checkpoints import upstream
from tokenizers_mm.checkpoints.cnn import read_networks, taming_rules
from tokenizers_mm.checkpoints.family import Checkpoint, Family
from tokenizers_mm.checkpoints.upstream import Link, Rule, Shape, link, take
from tokenizers_mm.config import checked
from tokenizers_mm.decoders.diffusion import TokenDenoiserConfig
from tokenizers_mm.decoders.mar import MARDecoderConfig
from tokenizers_mm.encoders.mar import MAREncoderConfig
from tokenizers_mm.models import MAR, MARConfig, Provenance
from tokenizers_mm.models.kl import KLAutoencoder, KLConfig
from tokenizers_mm.models.loading import build, fill

MAR_SOURCE = Provenance(source="https://github.com/LTH14/mar", license="MIT")
HARMON_SOURCE = Provenance(
    source="wusize/harmon on the Hugging Face hub",
    license="other",
    notice="Harmon's weights are under the NTU S-Lab License 1.0: non-commercial use only.",
)

HEADS = {768: 12, 1024: 16, 1280: 16}
"""Attention heads of the published widths (MAR-B, L and H)."""

LANGUAGE_PREFIXES = ("llm.", "proj_in.", "proj_out.")
"""Prefixes of what a Harmon file holds beside MAR: the language model and the two projectors."""

_UNUSED_PREFIXES = ("loss.",)
"""Training-only parts that an autoencoder's file may hold."""

_MAR_RULES: list[Rule] = [
    (r"^encoder\.embed\.", "z_proj."),
    (r"^encoder\.embed_norm\.", "z_proj_ln."),
    (r"^encoder\.classes\.", "class_emb."),
    (r"^encoder\.no_class$", "fake_latent"),
    (r"^decoder\.mask_token$", "mask_token"),
    (r"^decoder\.out_positions$", "diffusion_pos_embed_learned"),
    (r"^(en|de)coder\.positions$", r"\1coder_pos_embed_learned"),
    (r"^(en|de)coder\.(blocks|norm)\.", r"\1coder_\2."),
    (r"^decoder\.embed\.", "decoder_embed."),
    (r"^denoiser\.time\.", "diffloss.net.time_embed.mlp."),
    (r"^denoiser\.condition\.", "diffloss.net.cond_embed."),
    (r"^denoiser\.embed\.", "diffloss.net.input_proj."),
    (r"^denoiser\.(out)\.", "diffloss.net.final_layer.linear."),
    (r"^denoiser\.modulation\.", "diffloss.net.final_layer.adaLN_modulation.1."),
    (r"^denoiser\.blocks\.(\d+)\.norm\.", r"diffloss.net.res_blocks.\1.in_ln."),
    (r"^denoiser\.blocks\.(\d+)\.modulation\.", r"diffloss.net.res_blocks.\1.adaLN_modulation.1."),
    (r"^denoiser\.blocks\.", "diffloss.net.res_blocks."),
]


@dataclass(frozen=True)
class HarmonWeights:
    """A Harmon file: the tokenizer, and the state dicts of its language model and of both projectors.

    language_model: names as transformers has them. projectors: `proj_in.0.weight` and so on.
    """

    tokenizer: MAR
    language_model: dict[str, Tensor]
    projectors: dict[str, Tensor]


def convert(
    tensors: Mapping[str, Tensor], where: str, config: Mapping[str, Any] | None = None, *, autoencoder: str = ""
) -> MAR:
    """A tokenizer from MAR's or Harmon's tensors. Warns of the licence where it forbids commercial use.

    autoencoder: the path of `kl16.ckpt`; needed where the file does not hold the autoencoder itself (`vae.*`).
    """
    harmon = any(name.startswith("mar.") for name in tensors)
    own = {n: t for n, t in tensors.items() if not harmon or not n.startswith(LANGUAGE_PREFIXES)}
    with_own = harmon and any(name.startswith("vae.") for name in own)
    kl_prefix, kl_tensors = "vae.", own
    if not with_own:
        expected = "the path of kl16.ckpt (the file itself holds no autoencoder)"
        require(bool(autoencoder), "autoencoder", expected, "nothing")
        kl_prefix, kl_tensors = "", _without_unused(upstream.read(autoencoder))
    with upstream.description_errors():
        schema = checked(read_config(own, kl_tensors, where, config))
    tokenizer = build(MAR, schema)
    shapes = {name: tuple(t.shape) for name, t in tokenizer.state_dict().items()}
    kl_links = kl_links_of({n: s for n, s in shapes.items() if n.startswith("autoencoder.")}, kl_prefix)
    links = links_of({n: s for n, s in shapes.items() if not n.startswith("autoencoder.")}, "mar." if harmon else "")
    if with_own:
        filled = take([*links, *kl_links], own, where)
    else:
        filled = {**take(links, own, where), **take(kl_links, kl_tensors, autoencoder)}
    fill(tokenizer, filled, where)
    tokenizer.provenance = HARMON_SOURCE if harmon else MAR_SOURCE
    if harmon:
        warnings.warn(HARMON_SOURCE.notice, stacklevel=2)
    return tokenizer.eval()  # type: ignore[return-value]


def read_harmon(path: str, autoencoder: str = "", config: Mapping[str, Any] | None = None) -> HarmonWeights:
    """All parts of a Harmon file; `llm.continuous` takes the projectors, any transformers model the rest."""
    tensors = upstream.read(path)
    llm, others = LANGUAGE_PREFIXES[0], LANGUAGE_PREFIXES[1:]
    projectors = {n: t.float() for n, t in tensors.items() if n.startswith(others)}
    language_model = {n.removeprefix(llm): t for n, t in tensors.items() if n.startswith(llm)}
    require(bool(projectors and language_model), path, "a Harmon checkpoint (llm.*, proj_in.*, proj_out.*)", "none")
    tokenizer = convert(tensors, path, config, autoencoder=autoencoder).float()
    return HarmonWeights(tokenizer, language_model, projectors)


def read_kl16(path: str) -> KLAutoencoder:
    """The autoencoder alone, from `kl16.ckpt`; strict but for `loss.*`, the training-only parts."""
    tensors = _without_unused(upstream.read(path))
    with upstream.description_errors():
        schema = checked(read_kl_config(tensors, path))
    autoencoder = KLAutoencoder(schema)
    shapes = {f"autoencoder.{name}": tuple(t.shape) for name, t in autoencoder.state_dict().items()}
    filled = take(kl_links_of(shapes), tensors, path)
    fill(autoencoder, {name.removeprefix("autoencoder."): t for name, t in filled.items()}, path)
    return autoencoder.float().eval()


def links_of(shapes: Mapping[str, Shape], prefix: str = "") -> list[Link]:
    """Links from our names of MAR's parts (not the autoencoder's) to the published ones."""
    return link(shapes, [*_MAR_RULES, (r"^", prefix)])


def kl_links_of(shapes: Mapping[str, Shape], prefix: str = "") -> list[Link]:
    """Links of `autoencoder.*` to the names in kl16.ckpt."""
    levels = _count(shapes, r"autoencoder\.decoder\.levels\.(\d+)\.")
    return link(shapes, [(r"^autoencoder\.", ""), *_kl_rules(levels), (r"^", prefix)])


def _kl_rules(levels: int) -> list[Rule]:
    return [(r"^quant\.", "quant_conv."), (r"^post_quant\.", "post_quant_conv."), *taming_rules(levels)]


def read_config(
    tensors: Mapping[str, Tensor], kl_tensors: Mapping[str, Tensor], where: str, config: Mapping[str, Any] | None = None
) -> MARConfig:
    """Our configuration, from shapes; `config["mar"]`, in the form of the reference cases, may give the heads."""
    shapes = {name.removeprefix("mar."): tuple(t.shape) for name, t in tensors.items()}
    given = dict((config or {}).get("mar", {}))
    width, dim = _shape(shapes, "z_proj.weight", where)
    decoder_width = _shape(shapes, "mask_token", where)[-1]
    length = _shape(shapes, "diffusion_pos_embed_learned", where)[1]
    side = math.isqrt(length)
    require(side * side == length, f"{where}: diffusion_pos_embed_learned", "a square grid", f"{length} positions")
    buffers = _shape(shapes, "encoder_pos_embed_learned", where)[1] - length
    mlp_ratio = _shape(shapes, "encoder_blocks.0.mlp.fc1.weight", where)[0] / width
    common = {"mlp_ratio": mlp_ratio, "grid": (side, side), "num_buffers": buffers}
    common["dropout"] = float(given.get("proj_dropout", MAREncoderConfig.dropout))
    return MARConfig(
        autoencoder=read_kl_config(kl_tensors, where),
        encoder=MAREncoderConfig(
            token_dim=dim,
            width=width,
            depth=_count(shapes, r"encoder_blocks\.(\d+)\."),
            heads=given.get("encoder_num_heads") or _heads(width, where),
            num_classes=_shape(shapes, "class_emb.weight", where)[0],
            **common,
        ),
        decoder=MARDecoderConfig(
            encoder_width=width,
            width=decoder_width,
            depth=_count(shapes, r"decoder_blocks\.(\d+)\."),
            heads=given.get("decoder_num_heads") or _heads(decoder_width, where),
            **common,
        ),
        denoiser=TokenDenoiserConfig(
            token_dim=dim,
            condition_dim=decoder_width,
            width=_shape(shapes, "diffloss.net.input_proj.weight", where)[0],
            depth=_count(shapes, r"diffloss\.net\.res_blocks\.(\d+)\."),
        ),
        noise_repeats=int(given.get("diffusion_batch_mul", MARConfig.noise_repeats)),
    )


def read_kl_config(tensors: Mapping[str, Tensor], where: str) -> KLConfig:
    """Our configuration of an autoencoder of this family, from the shapes."""
    shapes = {name.removeprefix("vae."): tuple(t.shape) for name, t in tensors.items()}
    encoder, decoder, _ = read_networks(shapes, _kl_rules, where)
    return KLConfig(encoder, decoder)


def _without_unused(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: t for name, t in tensors.items() if not name.startswith(_UNUSED_PREFIXES)}


def _heads(width: int, where: str) -> int:
    if width not in HEADS:
        fail(where, f"a published width ({', '.join(map(str, HEADS))}), or a config with the heads", f"width {width}")
    return HEADS[width]


def _shape(shapes: Mapping[str, Shape], name: str, where: str) -> Shape:
    if name not in shapes:
        fail(where, f"a tensor {name}", "none")
    return shapes[name]


def _count(shapes: Mapping[str, Shape], pattern: str) -> int:
    """One more than the largest index in the names that match."""
    found = (re.match(pattern, name) for name in shapes)
    return 1 + max((int(match[1]) for match in found if match), default=-1)


_SHOWN = "the original code at small sizes: latents, images, losses and gradients"

FAMILY = Family(
    convert,
    (
        Checkpoint(
            "https://github.com/LTH14/mar: mar_base.pth, mar_large.pth, mar_huge.pth", (256, 256), (), "MIT", _SHOWN
        ),
        Checkpoint("wusize/harmon: harmon_0.5b.pth, harmon_1.5b.pth", (256, 256), (), "NTU S-Lab License 1.0", _SHOWN),
    ),
)
