"""Distances between two sets of features: Frechet, kernel (MMD), and the inception score of one set."""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor


@dataclass
class Moments:
    """Count, sum and sum of outer products of features, float64, about a fixed shift, so that little cancels.

    The shift is the mean of the first batch. No feature is kept.
    """

    count: int = 0
    shift: Tensor | None = None
    total: Tensor | None = None
    squares: Tensor | None = None

    def add(self, features: Tensor) -> None:
        """Take features [N, D]."""
        features = features.double()
        if self.shift is None or self.total is None or self.squares is None:
            self.shift = features.mean(0)
            self.total = torch.zeros_like(self.shift)
            self.squares = torch.zeros(len(self.shift), len(self.shift), dtype=torch.float64)
        features = features - self.shift
        self.count += len(features)
        self.total = self.total + features.sum(0)
        self.squares = self.squares + features.T @ features

    def mean_and_covariance(self) -> tuple[Tensor, Tensor]:
        """Mean [D] and unbiased covariance [D, D]; at least two features must have been added."""
        assert self.shift is not None and self.total is not None and self.squares is not None and self.count > 1
        mean = self.total / self.count
        covariance = (self.squares - self.count * torch.outer(mean, mean)) / (self.count - 1)
        return mean + self.shift, covariance


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
