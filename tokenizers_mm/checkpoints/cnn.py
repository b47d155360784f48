"""Names of the convolutional encoders and decoders that descend from VQGAN (taming-transformers), and their sizes.

    rules = taming_rules(levels)                        # our names -> theirs; a code base adds its differences
    tokenizer = read_vqgan(tensors, where, rules_of, quantizer)  # sizes from names and shapes alone; strict

Our names are those of `models.vqgan.VQGAN`; levels of their decoders are counted from fine to coarse.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal

from torch import Tensor

from tokenizers_mm._check import fail, require
from tokenizers_mm.checkpoints.upstream import Link, Rule, Shape, link, take
from tokenizers_mm.config import checked
from tokenizers_mm.decoders.pixel import PixelDecoderConfig
from tokenizers_mm.encoders.pixel import PixelEncoderConfig
from tokenizers_mm.layers.conv import Resampling
from tokenizers_mm.models.loading import account, build, fill
from tokenizers_mm.models.vqgan import VQGAN, VQGANConfig
from tokenizers_mm.quantizers import ScalesConfig

RulesOf = Callable[[int], list[Rule]]
"""Rules from our names to the published ones, for a number of levels."""


def taming_rules(levels: int) -> list[Rule]:
    """Names of taming-transformers, and of the many code bases that took its networks."""
    return [
        *finest_first(levels),
        (r"^head\.", "quant_conv."),
        (r"^embed\.", "post_quant_conv."),
        (r"\.middle\.block(\d)\.", r".mid.block_\1."),
        (r"\.middle\.attention\.", ".mid.attn_1."),
        (r"^encoder\.levels\.", "encoder.down."),
        (r"\.blocks\.", ".block."),
        (r"\.attentions\.", ".attn."),
        (r"^encoder\.(.*)\.resample\.", r"encoder.\1.downsample."),
        (r"^decoder\.(.*)\.resample\.", r"decoder.\1.upsample."),
        (r"\.shortcut\.", ".nin_shortcut."),
        (r"\.proj\.", ".proj_out."),
    ]


def finest_first(levels: int) -> list[Rule]:
    """`decoder.up.INDEX` for the levels of the decoder, which ours counts from coarse to fine."""
    last = levels - 1
    return [(rf"^decoder\.levels\.{index}\.", f"decoder.up.{last - index}.") for index in range(levels)]


def magvit_rules(levels: int) -> list[Rule]:
    """Names of Open-MAGVIT2, and of the code bases that took its networks."""
    last = levels - 1
    middle: list[Rule] = [(rf"\.middle\.others\.{i}\.", f".mid_block.{i + 2}.") for i in range(62)]
    return [
        (r"^encoder\.(.*)\.resample\.conv\.", r"encoder.\1.downsample."),
        (r"^decoder\.(.*)\.resample\.conv\.", r"decoder.\1.upsample.conv1."),
        (r"\.middle\.block1\.", ".mid_block.0."),
        (r"\.middle\.block2\.", ".mid_block.1."),
        *middle,
        *[(rf"^decoder\.level_norms\.{i}\.", f"decoder.adaptive.{last - i}.") for i in range(levels)],
        (r"^(decoder\.adaptive\..*)\.scale\.", r"\1.gamma."),
        (r"^(decoder\.adaptive\..*)\.shift\.", r"\1.beta."),
        *taming_rules(levels),
    ]


_BLOCK = ("conv1.weight", "conv2.weight", "conv1.bias", "conv2.bias")
_ATTENTION = ("proj.weight", "proj.bias", "q.weight", "k.weight")
_MODULATION = ("scale.weight", "scale.bias", "shift.weight", "shift.bias")
"""Tensors of a residual block, of an attention layer and of a norm with a context, by which a file shows that it has
one."""


class _Probe:
    """Published shapes, asked for by our names."""

    def __init__(self, shapes: Mapping[str, Shape], rules: Sequence[Rule], where: str) -> None:
        self.shapes, self.rules, self.where = shapes, rules, where

    def find(self, ours: str) -> Shape | None:
        """The shape of a tensor, None where the file has none of that name."""
        return self.shapes.get(self.name(ours))

    def get(self, ours: str) -> Shape:
        """The shape of a convolution's weight that every file of the family has."""
        shape = self.find(ours) or fail(self.where, f"a tensor {self.name(ours)}", "none")
        require(len(shape) == 4, f"{self.where}: {self.name(ours)}", "a convolution's weight", list(shape))
        bias = ours.replace(".weight", ".bias")
        channels = (self.find(bias) or shape)[0]
        expected = f"{channels} channels, as {self.name(bias)} has"
        require(channels == shape[0], f"{self.where}: {self.name(ours)}", expected, shape[0])
        return shape

    def has(self, part: str, tensors: Sequence[str]) -> bool:
        """True if the file has any of these tensors of a part: one that is missing is no sign of another form."""
        return any(self.find(f"{part}.{tensor}") is not None for tensor in tensors)

    def count(self, part: str) -> int:
        """Number of residual blocks with `{}` for 0, 1, 2... in the name of ours that the file has."""
        return next(i for i in range(1000) if not self.has(part.format(i), _BLOCK))

    def name(self, ours: str) -> str:
        """The published name."""
        return str(link({ours: ()}, self.rules)[0].theirs[0])


def read_networks(
    shapes: Mapping[str, Shape], rules_of: RulesOf, where: str, resampling: Resampling = "conv"
) -> tuple[PixelEncoderConfig, PixelDecoderConfig, Literal[0, 1, 3]]:
    """Sizes of encoder and decoder, and the kernel of the two convolutions beside the quantizer (0 without them)."""
    first = _Probe(shapes, rules_of(0), where)
    levels = first.count("encoder.levels.{}.blocks.0")
    probe = _Probe(shapes, rules_of(levels), where)
    sizes = _sizes(probe, "encoder", range(levels), "encoder.conv_in.weight", where)
    encoder = PixelEncoderConfig(
        out_channels=probe.get("encoder.conv_out.weight")[0],
        **{**sizes, "num_blocks": _uniform(sizes["num_blocks"])},
        resampling=resampling,
        out_kernel=3 if probe.get("encoder.conv_out.weight")[-1] == 3 else 1,
    )
    finest = f"decoder.levels.{levels - 1}.blocks.0.conv2.weight"
    sizes = _sizes(probe, "decoder", range(levels)[::-1], finest, where)
    decoder = PixelDecoderConfig(
        in_channels=probe.get("decoder.conv_in.weight")[1],
        **{**sizes, "num_blocks": _uniform([count - 1 for count in sizes["num_blocks"]])},
        resampling=resampling,
        level_norms=probe.has("decoder.level_norms.0", _MODULATION),
        context_channels=probe.get("decoder.norm_out.scale.weight")[1]
        if probe.has("decoder.norm_out", _MODULATION)
        else None,
    )
    around = [f"{part}.{name}" for part in ("head", "embed") for name in ("weight", "bias")]
    head = probe.find("head.weight")
    whole = head is not None or not any(map(probe.find, around))
    require(whole, where, f"a tensor {probe.name('head.weight')}", "none")
    kernel = (head or (0,))[-1]
    require(kernel in (0, 1, 3), f"{where}: {probe.name('head.weight')}", "a kernel of 1 or 3", kernel)
    return encoder, decoder, kernel  # type: ignore[return-value]


def _sizes(probe: _Probe, network: str, order: Sequence[int], finest: str, where: str) -> dict[str, Any]:
    """Options that both networks have.

    order: our indices of the levels from fine to coarse. finest: our name of the tensor whose first size all widths
    are multiples of.
    """
    require(bool(order), where, f"a tensor {probe.name(f'{network}.levels.0.blocks.0.conv1.weight')}", "none")
    channels = probe.get(finest)[0]
    widths = [probe.get(f"{network}.levels.{i}.blocks.0.conv2.weight")[0] for i in order]
    divides = all(width % channels == 0 for width in widths)
    require(divides, f"{where}: {probe.name(finest)}", f"channels that divide the widths {widths}", channels)
    attention = [probe.has(f"{network}.levels.{i}.attentions.0", _ATTENTION) for i in order]
    middle = f"{network}.middle"
    return {
        "channels": channels,
        "multipliers": tuple(width // channels for width in widths),
        "num_blocks": [probe.count(f"{network}.levels.{i}.blocks.{{}}") for i in order],
        "attention_levels": tuple(level for level, found in enumerate(attention) if found),
        "middle_blocks": 2 + probe.count(f"{middle}.others.{{}}"),
        "middle_attention": probe.has(f"{middle}.attention", _ATTENTION),
        "bias": probe.has(middle, [f"block{i}.conv{j}.bias" for i in (1, 2) for j in (1, 2)]),
        "still_blocks": probe.count(f"{network}.still.blocks.{{}}"),
    }


def _uniform(counts: Sequence[int]) -> int | tuple[int, ...]:
    """One number where all are equal."""
    return counts[0] if len(set(counts)) == 1 else tuple(counts)


def read_vqgan(
    tensors: Mapping[str, Tensor],
    where: str,
    rules_of: RulesOf,
    quantizer: Any,
    *,
    resampling: Resampling = "conv",
    scales: Sequence[tuple[int, int]] | None = None,
    multiscale: ScalesConfig | None = None,
    unused: Mapping[str, Shape] | None = None,
    adjust: Callable[[Link], Link] = lambda item: item,
) -> VQGAN:
    """A tokenizer with the sizes and weights of a file.

    quantizer: its configuration. scales, multiscale: grids of a multi-scale tokenizer, and how they are joined.
    unused: published tensors that are not kept. adjust: see `links_of`.
    """
    encoder, decoder, kernel = read_networks(shapes_of(tensors), rules_of, where, resampling)
    scales = None if scales is None else tuple(scales)
    schema = VQGANConfig(encoder, quantizer, decoder, kernel, scales, multiscale or ScalesConfig())
    tokenizer = build(VQGAN, checked(schema))
    shapes, rules = shapes_of(tokenizer.state_dict()), rules_of(len(encoder.multipliers))
    fill(tokenizer, take(links_of(shapes, rules, adjust), tensors, where, unused), where)
    return tokenizer.eval()  # type: ignore[return-value]


def links_of(
    shapes: Mapping[str, Shape], rules: Sequence[Rule], adjust: Callable[[Link], Link] = lambda item: item
) -> list[Link]:
    """Links from our names to the published ones; `adjust` gives a link its published shape or part."""
    return [adjust(item) for item in link(shapes, rules)]


def joined_attention(item: Link) -> Link:
    """The link of a query, key or value projection that is a third of one published `qkv` convolution."""
    if (found := re.search(r"\.(?:attentions\.\d+|attention)\.([qkv])\.(weight|bias)$", item.ours)) is None:
        return item
    name = re.sub(r"\.[qkv]\.(weight|bias)$", r".qkv.\1", str(item.theirs[0]))
    shape = (3 * item.shape[0], *item.shape[1:])
    return replace(item, theirs=(name,), their_shape=shape, part=("qkv".index(found[1]), 3))


def shapes_of(tensors: Mapping[str, Tensor]) -> dict[str, Shape]:
    """Names and shapes."""
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}


AVERAGE = "model_ema."
"""Prefix of the moving average in files of Lightning trainers; the rest of a name has lost its dots."""


def averaged(tensors: Mapping[str, Tensor], where: str, ema: bool) -> dict[str, Tensor]:
    """Weights of a Lightning trainer's file by their own names: their moving average, or those of the last step.

    A file without an average has only the latter. `loss.*`, which only training needs, is left out. The average must
    have exactly the names and shapes of the weights.
    """
    plain = {name: t for name, t in tensors.items() if not name.startswith(("loss.", AVERAGE))}
    average = {name.removeprefix(AVERAGE): t for name, t in tensors.items() if name.startswith(AVERAGE)}
    if not average:
        return plain
    names = {name.replace(".", ""): name for name in plain}
    require(len(names) == len(plain), where, "names that differ without their dots", "equal ones")
    counters = ("decay", "num_updates")
    found = {
        names.get(name, AVERAGE + name): t
        for name, t in average.items()
        if name not in counters and not name.startswith("loss")
    }
    account(shapes_of(plain), found, where)
    return found if ema else plain


def shape_of(tensors: Mapping[str, Tensor], name: str, where: str, axes: int = 2) -> Shape:
    """The shape, of so many axes, of a tensor that every file of the family has."""
    tensor = tensors[name] if name in tensors else fail(where, f"a tensor {name}", "none")
    require(tensor.ndim == axes, f"{where}: {name}", f"a tensor of {axes} axes", tensor)
    return tuple(tensor.shape)


def cnn_facts(tokenizer: VQGAN, prefix: str = "ddconfig.") -> dict[str, Any]:
    """Sizes of both networks by the keys of a description of taming-transformers' form (see `check_description`)."""
    encoder = tokenizer.config.encoder
    return {
        f"{prefix}ch": encoder.channels,
        f"{prefix}ch_mult": encoder.multipliers,
        f"{prefix}z_channels": encoder.out_channels,
        f"{prefix}num_res_blocks": encoder.num_blocks,
    }
