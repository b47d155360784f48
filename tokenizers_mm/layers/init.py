"""Starting values that several networks share."""

from collections.abc import Iterable

from torch import Tensor, nn


def xavier_linears(module: nn.Module) -> None:
    """Xavier-uniform weights and zero bias for every linear layer inside (Glorot and Bengio, 2010)."""
    for part in module.modules():
        if isinstance(part, nn.Linear):
            nn.init.xavier_uniform_(part.weight)
            if part.bias is not None:
                nn.init.zeros_(part.bias)


def small_normal(tensors: Iterable[Tensor], std: float = 0.02) -> None:
    """N(0, std) for embeddings, position tables and learned tokens."""
    for tensor in tensors:
        nn.init.normal_(tensor, std=std)
