"""Distances between two sets of features: Frechet, kernel (MMD), and the inception score of one set."""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from tokenizers_mm._check import require


@dataclass
class Moments:
    """Count of features, and their shift [D], sum [D] and sum of outer products [D, D], float64; no feature is kept.

    The sums are of the features less the shift, which is the mean of the first batch, so that little cancels.
    """

    count: int = 0
    sums: tuple[Tensor, Tensor, Tensor] | None = None

    def add(self, features: Tensor) -> None:
        """Take features [N, D]."""
        features = features.double()
        if self.sums is None:
            zero = torch.zeros_like(features[0])
            self.sums = features.mean(0), zero, torch.outer(zero, zero)
        shift, total, squares = self.sums
        features = features - shift
        self.count += len(features)
        self.sums = shift, total + features.sum(0), squares + features.T @ features

    def mean_and_covariance(self) -> tuple[Tensor, Tensor]:
        """Mean [D] and unbiased covariance [D, D] of at least two features."""
        require(self.sums is not None and self.count > 1, "features", "at least two", self.count)
        assert self.sums is not None
        shift, total, squares = self.sums
        mean = total / self.count
        return mean + shift, (squares - self.count * torch.outer(mean, mean)) / (self.count - 1)


def frechet_distance(
    mean_a: Float[Tensor, "d"],
    covariance_a: Float[Tensor, "d d"],
    mean_b: Float[Tensor, "d"],
    covariance_b: Float[Tensor, "d d"],
) -> float:
    """Squared Frechet distance of two Gaussians (arXiv 1706.08500, eq. 6).

    The trace of the root of the product comes from the symmetric matrix of the same eigenvalues, A^(1/2) B A^(1/2).
    """
    values, vectors = torch.linalg.eigh(covariance_a)
    root = (vectors * values.clamp_min(0).sqrt()) @ vectors.T
    product = torch.linalg.eigvalsh(root @ covariance_b @ root).clamp_min(0).sqrt().sum()
    traces = covariance_a.trace() + covariance_b.trace()
    return float((mean_a - mean_b).square().sum() + traces - 2 * product)


def kernel_distance(a: Float[Tensor, "n d"], b: Float[Tensor, "m d"]) -> float:
    """Unbiased squared MMD with the kernel (x.y / D + 1)^3, the one of KID (arXiv 1801.01401, eq. 4)."""
    a, b = a.double(), b.double()
    within = []
    for x in (a, b):
        kernel = (x @ x.T / x.shape[1] + 1) ** 3
        within.append((kernel.sum() - kernel.diagonal().sum()) / (len(x) * (len(x) - 1)))
    across = ((a @ b.T / a.shape[1] + 1) ** 3).mean()
    return float(within[0] + within[1] - 2 * across)


def inception_score(count: int, probabilities: Float[Tensor, "c"], entropies: float) -> float:
    """exp of the mean KL divergence of class probabilities from their mean (arXiv 1606.03498, section 4).

    count: images. probabilities: sum over images, [C]. entropies: sum over images of their entropy, in nats.
    """
    mean = probabilities.double() / count
    return float((torch.special.entr(mean).sum() - entropies / count).exp())
