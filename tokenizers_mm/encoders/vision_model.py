"""Vision transformers of the package transformers as towers: CLIP, DINOv2 and 3, SigLIP and 2, ViT.

A configuration holds the sizes, so that a saved tokenizer is built without a network; no code of a checkpoint is run.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal, TypedDict

import torch
from torch import Tensor, nn

from tokenizers_mm._check import fail, require, shorten
from tokenizers_mm.config import Depth, Heads, Keys, Length, Range, Width, checked
from tokenizers_mm.encoders.semantic import CLIP_MEAN, CLIP_STD, normalize_image
from tokenizers_mm.layers.towers import ChannelDeviations, ChannelMeans

IMAGENET_MEAN, IMAGENET_STD, HALF = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225), (0.5, 0.5, 0.5)


@dataclass(frozen=True)
class _Facts:
    """Properties that a kind of model needs beside its sizes.

    mean, std: of its images, unless a preprocessor says otherwise. unused: its part that does not change the tokens of
    a whole image. tokens: class tokens before the patches, register tokens not counted. resizes: positions are
    interpolated when asked; otherwise they always are, or there are none.
    """

    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    unused: str
    tokens: int = 1
    resizes: bool = False


MODELS: dict[str, _Facts] = {
    "clip_vision_model": _Facts(CLIP_MEAN, CLIP_STD, "post_layernorm", resizes=True),
    "dinov2": _Facts(IMAGENET_MEAN, IMAGENET_STD, "embeddings.mask_token"),
    "dinov2_with_registers": _Facts(IMAGENET_MEAN, IMAGENET_STD, "embeddings.mask_token"),
    "dinov3_vit": _Facts(IMAGENET_MEAN, IMAGENET_STD, "embeddings.mask_token"),
    "siglip_vision_model": _Facts(HALF, HALF, "head", tokens=0, resizes=True),
    "vit": _Facts(HALF, HALF, "pooler", resizes=True),
}
"""The models by transformers' `model_type`."""

ModelType = Literal["clip_vision_model", "dinov2", "dinov2_with_registers", "dinov3_vit", "siglip_vision_model", "vit"]

_Factor = Annotated[float, Range(0, 1e6)]


class VisionModelOptions(TypedDict, total=False):
    """The only keys of a model's configuration that are taken: sizes, and nothing that names a file or code."""

    hidden_size: Width
    intermediate_size: Width
    num_hidden_layers: Depth
    num_attention_heads: Heads
    image_size: Annotated[int, Range(1, 4096)]
    patch_size: Annotated[int, Range(1, 256)]
    num_register_tokens: Annotated[int, Range(0, 1024)]
    hidden_act: Literal["gelu", "gelu_new", "gelu_pytorch_tanh", "quick_gelu", "relu", "silu"]
    layer_norm_eps: Annotated[float, Range(0, 1)]
    mlp_ratio: Annotated[int, Range(1, 256)]
    layerscale_value: _Factor
    rope_theta: Annotated[float, Range(1, 1e9)]
    qkv_bias: bool
    query_bias: bool
    key_bias: bool
    value_bias: bool
    proj_bias: bool
    mlp_bias: bool
    use_swiglu_ffn: bool
    use_gated_mlp: bool


@dataclass(frozen=True)
class VisionModelConfig:
    """A vision model of transformers.

    model: its `model_type`. options: keys of its configuration that differ from the defaults.
    pretrained: start from these weights, a hub id or a directory (read when a tokenizer is first built for training;
    reading a saved tokenizer never does).
    mean, std: of the image in [0, 1], which is clamped first; None passes the image in [-1, 1] on as it is.
    """

    model: ModelType
    options: Annotated[dict[str, Any], Keys(VisionModelOptions)] = field(default_factory=dict)
    pretrained: Annotated[str, Length(0, 1000)] = ""
    mean: ChannelMeans | None = None
    std: ChannelDeviations | None = None
    kind: Literal["transformers"] = "transformers"

    def check(self) -> None:
        """Refuse settings that do not go together."""
        require((self.mean is None) == (self.std is None), "mean and std", "both or neither", (self.mean, self.std))
        width, heads = self.options.get("hidden_size"), self.options.get("num_attention_heads")
        if width and heads:
            require(width % heads == 0, "options.hidden_size", f"a multiple of {heads} (num_attention_heads)", width)


class VisionModel(nn.Module):
    """x [B, 3, H, W] in [-1, 1] -> tokens [B, h, w, C] on the patch grid: `last_hidden_state` of the patches."""

    Config = VisionModelConfig

    def __init__(self, config: VisionModelConfig) -> None:
        super().__init__()
        self.config = config = checked(config)
        self.facts = MODELS[config.model]
        self.tower = _tokens_only(_create(config.model, config.options), self.facts.unused)
        self.sizes = self.tower.config
        self.dim = int(self.sizes.hidden_size)
        self.first = self.facts.tokens + int(getattr(self.sizes, "num_register_tokens", 0))

    def forward(self, x: Tensor) -> Tensor:
        x = normalize_image(x, self.config.mean, self.config.std)
        patch, trained = self.sizes.patch_size, self.sizes.image_size
        grid = (x.shape[-2] // patch, x.shape[-1] // patch)
        resized = self.facts.resizes and tuple(x.shape[-2:]) != (trained, trained)
        options = {"interpolate_pos_encoding": True} if resized else {}
        tokens = self.tower(pixel_values=x, **options).last_hidden_state[:, self.first :]
        require(tokens.shape[1] == grid[0] * grid[1], "x", f"images of whole patches of {patch} pixels", x)
        return tokens.unflatten(1, grid)

    def load_pretrained(self) -> None:
        """Take the published weights that the configuration names; its sizes must be theirs."""
        source, _ = published(self.config.pretrained)
        copy_tokens(source, self)


def _create(model: str, options: Mapping[str, Any]) -> Any:
    """A model with random weights."""
    transformers = _transformers()
    with _one_sentence("model and options", f"a {model} of transformers that can be built"):
        known = transformers.AutoConfig.for_model(model).to_dict()
        foreign = [key for key in options if key not in known]
        require(not foreign, "options", f"keys of {model}", foreign)
        return transformers.AutoModel.from_config(transformers.AutoConfig.for_model(model, **options))


def _tokens_only(model: Any, unused: str) -> Any:
    """The module that gives the tokens, without the part that they do not need."""
    model = getattr(model, "vision_model", model).eval()  # a wrapper of some versions of transformers
    path, _, last = unused.rpartition(".")
    setattr(model.get_submodule(path), last, nn.Identity() if last == "post_layernorm" else None)
    if last == "head":
        model.use_head = False
    return model


def published(source: str) -> tuple[Any, tuple[ChannelMeans, ChannelDeviations] | None]:
    """A model of transformers with its weights, and mean and deviation of its preprocessor where it has one.

    source: a hub id, or a directory with config.json and weights in safetensors. No code of it is run; of a model of
    images and texts only the part for images is read.
    """
    transformers = _transformers()
    with _one_sentence("pretrained", f"a vision model of transformers in {source!r}, with weights in safetensors"):
        facts, _ = transformers.PretrainedConfig.get_config_dict(source)
        kind = facts.get("model_type")
        require(kind in transformers.CONFIG_MAPPING, "pretrained", f"one of the models {sorted(MODELS)}", kind)
        whole = transformers.CONFIG_MAPPING[kind].from_dict(facts)
        config = getattr(whole, "vision_config", whole)
        require(config.model_type in MODELS, "pretrained", f"one of the models {sorted(MODELS)}", config.model_type)
        model, found = transformers.MODEL_MAPPING[type(config)].from_pretrained(
            source, config=config, use_safetensors=True, output_loading_info=True
        )
    missing = sorted(name.removeprefix("vision_model.") for name in found["missing_keys"])
    missing = [name for name in missing if not name.startswith(MODELS[config.model_type].unused)]
    require(not missing, f"weights of {source}", "all tensors of the model", f"none for {missing[:3]}")
    try:
        statistics, _ = transformers.ImageProcessingMixin.get_image_processor_dict(source)
    except (OSError, ValueError):
        return model, None
    mean, std = statistics.get("image_mean"), statistics.get("image_std")
    return model, None if mean is None or std is None else (tuple(mean), tuple(std))


def describe_model(model: Any) -> VisionModelConfig:
    """The configuration of a vision model of transformers, or of a configuration object of one."""
    config = getattr(model, "config", model)
    kind = getattr(config, "model_type", type(model).__name__)
    require(kind in MODELS, "name", f"one of the models {sorted(MODELS)} of transformers", kind)
    given, known = config.to_dict(), _transformers().AutoConfig.for_model(kind).to_dict()
    names = VisionModelOptions.__annotations__.keys() & known.keys()
    options = {name: given[name] for name in sorted(names) if given.get(name) is not None}
    facts = MODELS[kind]
    return checked(VisionModelConfig(kind, options, mean=facts.mean, std=facts.std))  # type: ignore[arg-type]


@torch.no_grad()
def copy_tokens(source: Any, tower: VisionModel) -> None:
    """Give a tower the weights of a model of transformers, and make sure that it gives the same tokens."""
    source = getattr(source, "vision_model", source).eval()
    state, wanted = source.state_dict(), tower.tower.state_dict()
    wrong = [name for name in wanted if name not in state or state[name].shape != wanted[name].shape]
    require(not wrong, "options", "the sizes of the published model", f"others for {wrong[:3]}")
    tower.tower.load_state_dict({name: state[name] for name in wanted})
    side, plain = tower.sizes.image_size, next(source.parameters())
    x = torch.linspace(-1, 1, 3 * side * side, dtype=plain.dtype, device=plain.device).view(1, 3, side, side)
    expected, found = source(pixel_values=x).last_hidden_state, tower.tower.to(plain)(pixel_values=x).last_hidden_state
    tower.float().cpu()
    same = torch.allclose(expected, found, atol=1e-4 * float(expected.abs().max()))
    require(same, "options", "a configuration that gives the tokens of the published model", "other tokens")


def _transformers() -> Any:
    """The package, loaded when a tower is built."""
    try:
        import transformers
    except ImportError:
        fail("tower", "the package transformers (pip install tokenizers-mm[llm])", "none")
    return transformers


@contextmanager
def _one_sentence(name: str, expected: str) -> Iterator[None]:
    """Turn what transformers makes of sizes and files that it cannot use into one error."""
    try:
        yield
    except (ArithmeticError, AttributeError, ImportError, LookupError, OSError, RuntimeError, TypeError) as error:
        fail(name, expected, shorten(f"{type(error).__name__}: {error}"))
