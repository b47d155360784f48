"""Networks and terms that exist for training only."""

from collections.abc import Callable

from torch import Tensor

from tokenizers_mm.types import Reconstruction

LOSSES: dict[str, Callable[[Tensor, Reconstruction], Tensor]] = {}
"""Terms of the caller's own, by the name that `loss.weights` of a configuration gives a weight to.

Each is a function of the images [B, 3, H, W] in [-1, 1] and their `Reconstruction` that returns a scalar;
`tokenizers_mm.register("loss", name, function)` adds one.
"""
