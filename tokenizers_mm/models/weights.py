"""Weights of one tokenizer for another that differs in some parts."""

from math import isqrt

from torch import Tensor, nn

from tokenizers_mm._check import require
from tokenizers_mm.functional.positions import resize_positions


def copy_weights(source: nn.Module, target: nn.Module, reinit: tuple[str, ...] = (), where: str = "source") -> None:
    """Give `target` the weights of `source`, but for names that begin with one of `reinit`, which keep their own.

    Learned positions of a square grid are resized to the square grid of the target. Any other difference is an error.
    """
    theirs = {name: tensor for name, tensor in source.state_dict().items() if not name.startswith(reinit)}
    state = target.state_dict()
    unknown = [prefix for prefix in reinit if not any(name.startswith(prefix) for name in state)]
    require(not unknown, f"{where}: reinit", "beginnings of names of parameters", unknown)
    ours = {name: tensor for name, tensor in state.items() if not name.startswith(reinit)}
    for name in theirs.keys() & ours.keys():
        if theirs[name].shape != ours[name].shape and name.endswith(("pos_embed", "positions")):
            theirs[name] = _resized(theirs[name], ours[name].shape[1])
    wrong = sorted(theirs.keys() ^ ours.keys())
    wrong += [name for name in ours if name in theirs and theirs[name].shape != ours[name].shape]
    if wrong:
        raise ValueError(
            f"{where}: expected equal tensors but for those in reinit {list(reinit)}, "
            f"got a difference in {len(wrong)}: {', '.join(wrong[:3])}"
        )
    target.load_state_dict({**state, **theirs})


def _resized(table: Tensor, count: int) -> Tensor:
    """A table [1, n, d] of a square grid, with or without a row for the class token, for `count` rows."""
    extra = table.shape[1] - isqrt(table.shape[1]) ** 2
    trained, grid = isqrt(table.shape[1] - extra), isqrt(count - extra)
    return resize_positions(table, (trained, trained), (grid, grid))
