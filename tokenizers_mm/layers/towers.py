"""timm's image towers: the names and options that a configuration may give, and how one is built."""

from typing import Annotated, Any, Literal, TypedDict

from torch import nn

from tokenizers_mm._check import fail, require, shorten
from tokenizers_mm.config import Length, MLPRatio, Pattern, Range, Share, Width

_CONSTRUCTION = (ArithmeticError, AssertionError, AttributeError, LookupError, RuntimeError, TypeError, ValueError)
"""Errors of timm's constructors for sizes that they do not check themselves."""

_Side = Annotated[int, Range(1, 4096)]
_StemDepth = Annotated[int, Range(1, 64)]
_Mean = Annotated[float, Range(-10, 10)]
_Deviation = Annotated[float, Range(1e-6, 1e6)]

ChannelMeans = tuple[_Mean, _Mean, _Mean]
ChannelDeviations = tuple[_Deviation, _Deviation, _Deviation]
"""Standard deviations of the red, green and blue values of an image in [0, 1]; `ChannelMeans` are their means."""


TowerName = Annotated[
    str,
    Length(1, 100),
    Pattern(r"[a-z0-9][a-z0-9_]*(\.[a-z0-9_]+)?", "the plain name of a timm architecture (no source, address or path)"),
]


class StemOptions(TypedDict):
    """Sizes of ViTamin's convolutional stem."""

    embed_dim: tuple[Width, Width, Width]
    depths: tuple[_StemDepth, _StemDepth, _StemDepth]
    stem_width: Width


class TowerOptions(TypedDict, total=False):
    """The only options that reach `timm.create_model`: sizes, and nothing that names a file, an address or code."""

    img_size: _Side | tuple[_Side, _Side]
    patch_size: Annotated[int, Range(1, 256)]
    embed_dim: Width
    depth: Annotated[int, Range(1, 256)]
    num_heads: Annotated[int, Range(1, 1024)]
    mlp_ratio: MLPRatio
    num_classes: Annotated[int, Range(0, 1 << 20)]
    qkv_bias: bool
    class_token: bool
    reg_tokens: Annotated[int, Range(0, 1024)]
    init_values: Annotated[float, Range(0, 1)] | None
    drop_rate: Share
    proj_drop_rate: Share
    attn_drop_rate: Share
    drop_path_rate: Share
    act_layer: Literal["gelu", "gelu_tanh", "quick_gelu", "relu", "silu"]
    global_pool: Literal["", "avg", "map", "token"]
    output_stride: Literal[2, 4, 8, 16, 32]
    embed_cfg: StemOptions


def create_tower(name: str, pretrained: bool, **options: Any) -> nn.Module:
    """A timm tower without a head by default. What its constructors make of sizes that they cannot use is one error."""
    import timm  # heavy: loaded when a tower is built, not with the package
    from timm.models.vitamin import VitCfg

    if "embed_cfg" in options:  # timm takes the sizes of a hybrid stem as an object of its own
        options["embed_cfg"] = VitCfg(**options["embed_cfg"])
    try:
        tower = timm.create_model(name, pretrained=pretrained, **{"num_classes": 0, **options})
    except _CONSTRUCTION as error:
        fail("name and options", "a timm model that can be built", f"{name!r} ({_sentence(error)})")
    for part in ("forward_features", "num_features"):
        require(hasattr(tower, part), "name", f"a timm model with {part}", repr(name))
    return tower


def _sentence(error: Exception) -> str:
    return shorten(" ".join(f"{type(error).__name__}: {error}".split()), 200)
