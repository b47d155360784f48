"""The weights of the terms: the field names are the terms' names, and each weight is applied once, here."""

from dataclasses import asdict, dataclass

from torch import Tensor


@dataclass(frozen=True)
class TermWeights:
    """Weight of each term of the generator's loss; the discriminator's loss has the weight of `generator`."""

    pixel: float = 1.0
    perceptual: float = 0.0
    semantic: float = 0.0
    codebook: float = 1.0
    commitment: float = 0.25
    entropy: float = 0.0
    generator: float = 0.0


def weighted_sum(terms: dict[str, Tensor], weights: TermWeights) -> Tensor:
    """Sum of weight * term. A term without a weight is a fault of the program, never silently left out."""
    table = asdict(weights)
    assert terms.keys() <= table.keys(), f"terms without a weight: {sorted(terms.keys() - table.keys())}"
    return sum((table[name] * term for name, term in terms.items()), next(iter(terms.values())).new_zeros(()))
