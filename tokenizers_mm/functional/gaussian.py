"""Diagonal Gaussians, given by mean and log-variance: draws, divergences and the likelihood of 8-bit values.

Sources: Kingma and Welling, Auto-Encoding Variational Bayes (arXiv 1312.6114), appendix B; Ho et al., Denoising
Diffusion Probabilistic Models (arXiv 2006.11239), eq. 13.
"""

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

LOG_VARIANCE_RANGE = (-30.0, 20.0)


@dataclass(frozen=True)
class DiagonalGaussian:
    """N(mean, exp(log_variance)), element by element; both have one shape."""

    mean: Tensor
    log_variance: Tensor

    @classmethod
    def from_moments(cls, moments: Float[Tensor, "b c2 *n"]) -> "DiagonalGaussian":
        """First half of the channels: means; second half: log-variances, clamped to [-30, 20]."""
        mean, log_variance = moments.chunk(2, dim=1)
        return cls(mean, log_variance.clamp(*LOG_VARIANCE_RANGE))

    @property
    def std(self) -> Tensor:
        """Standard deviations."""
        return (0.5 * self.log_variance).exp()

    def sample(self, noise: Tensor) -> Tensor:
        """mean + std * noise, where the noise is standard normal."""
        return self.mean + self.std * noise

    def kl(self) -> Float[Tensor, "b"]:
        """KL(self || N(0, 1)) in nats, summed over all axes but the first."""
        zero = torch.zeros_like(self.mean)
        return gaussian_kl(self.mean, self.log_variance, zero, zero).flatten(1).sum(1)


def gaussian_kl(
    mean: Float[Tensor, "*n"],
    log_variance: Float[Tensor, "*n"],
    other_mean: Float[Tensor, "*n"],
    other_log_variance: Float[Tensor, "*n"],
) -> Float[Tensor, "*n"]:
    """KL(N(mean, .) || N(other_mean, .)) of every element, in nats."""
    ratio = (log_variance - other_log_variance).exp()
    distance = (mean - other_mean).square() * (-other_log_variance).exp()
    return 0.5 * (ratio + distance - 1 + other_log_variance - log_variance)


def discretized_log_likelihood(
    x: Float[Tensor, "*n"], mean: Float[Tensor, "*n"], log_std: Float[Tensor, "*n"]
) -> Float[Tensor, "*n"]:
    """Log-probability, in nats, of the 8-bit bin around x in [-1, 1] (width 2 / 255; the outer bins are open)."""
    inverse = (-log_std).exp()
    below = _normal_cdf((x - mean - 1 / 255) * inverse)
    above = _normal_cdf((x - mean + 1 / 255) * inverse)
    middle = (above - below).clamp_min(1e-12)
    inside = torch.where(x > 0.999, (1 - below).clamp_min(1e-12), middle)
    return torch.where(x < -0.999, above.clamp_min(1e-12), inside).log()


def _normal_cdf(x: Tensor) -> Tensor:
    """The tanh approximation of the standard normal distribution function (Page, 1977), to 2e-4."""
    return 0.5 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x.pow(3))))
