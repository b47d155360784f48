"""Where the weights of a run come from: chance, timm's published towers, or a saved tokenizer, wholly or in part."""

from math import isqrt
from typing import Any

from torch import Tensor

from tokenizers_mm import load
from tokenizers_mm.config import from_mapping
from tokenizers_mm.encoders.semantic import SemanticEncoder, load_pretrained
from tokenizers_mm.functional.positions import resize_positions
from tokenizers_mm.models import MODELS, ImageTokenizer

from .config import ModelConfig


def build_tokenizer(model: ModelConfig) -> ImageTokenizer[Any]:
    """The tokenizer that a run begins with."""
    if not model.config:
        return load(model.start_from)
    family = MODELS[model.family]
    tokenizer = family.from_config(from_mapping(family.Config, model.config, "config.model.config"))
    if model.start_from:
        copy_weights(load(model.start_from), tokenizer, model.fresh)
    for module in tokenizer.modules():
        if isinstance(module, SemanticEncoder) and module.config.pretrained and not model.start_from:
            load_pretrained(module)
    return tokenizer


def copy_weights(source: ImageTokenizer[Any], target: ImageTokenizer[Any], fresh: tuple[str, ...]) -> None:
    """Give `target` the weights of `source`, but for names that begin with one of `fresh`, which keep their own.

    Learned positions of a square grid are resized to the square grid of the target. Any other difference is an error.
    """
    theirs = {name: tensor for name, tensor in source.state_dict().items() if not name.startswith(fresh)}
    state = target.state_dict()
    ours = {name: tensor for name, tensor in state.items() if not name.startswith(fresh)}
    for name in theirs.keys() & ours.keys():
        if theirs[name].shape != ours[name].shape and name.endswith(("pos_embed", "positions")):
            theirs[name] = _resized(theirs[name], ours[name].shape[1])
    wrong = sorted(theirs.keys() ^ ours.keys())
    wrong += [name for name in ours if name in theirs and theirs[name].shape != ours[name].shape]
    if wrong:
        raise ValueError(
            f"config.model.start_from: expected equal tensors but for those in fresh {list(fresh)}, "
            f"got a difference in {len(wrong)}: {', '.join(wrong[:3])}"
        )
    target.load_state_dict({**state, **theirs})


def _resized(table: Tensor, count: int) -> Tensor:
    """A table [1, n, d] of a square grid, with or without a row for the class token, for `count` rows."""
    extra = table.shape[1] - isqrt(table.shape[1]) ** 2
    trained, grid = isqrt(table.shape[1] - extra), isqrt(count - extra)
    return resize_positions(table, (trained, trained), (grid, grid))
