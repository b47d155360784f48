"""GAN losses. Logits come from a discriminator: higher means more real. All are means over all logits.

Sources: hinge, Lim and Ye (arXiv 1705.02894); non-saturating, Goodfellow et al. (arXiv 1406.2661, section 3); LeCam,
Tseng et al. (arXiv 2104.03310, eq. 4); R1, Mescheder et al. (arXiv 1801.04406, eq. 9); adaptive weight, Esser et al.
(arXiv 2012.09841, eq. 7).
"""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor


def hinge_discriminator(real: Float[Tensor, "*n"], fake: Float[Tensor, "*m"]) -> Float[Tensor, ""]:
    """0.5 * (mean relu(1 - real) + mean relu(1 + fake))."""
    return 0.5 * (F.relu(1 - real).mean() + F.relu(1 + fake).mean())


def hinge_generator(fake: Float[Tensor, "*n"]) -> Float[Tensor, ""]:
    """-mean fake."""
    return -fake.mean()


def logistic_discriminator(real: Float[Tensor, "*n"], fake: Float[Tensor, "*m"]) -> Float[Tensor, ""]:
    """0.5 * (mean -log sigmoid(real) + mean -log sigmoid(-fake))."""
    return 0.5 * (F.softplus(-real).mean() + F.softplus(fake).mean())


def non_saturating_generator(fake: Float[Tensor, "*n"]) -> Float[Tensor, ""]:
    """mean -log sigmoid(fake)."""
    return F.softplus(-fake).mean()


def lecam(
    real: Float[Tensor, "*n"], fake: Float[Tensor, "*m"], mean_real: Tensor, mean_fake: Tensor
) -> Float[Tensor, ""]:
    """Regularisation towards moving averages of the logits of the other class."""
    return F.relu(real - mean_fake).square().mean() + F.relu(mean_real - fake).square().mean()


def r1_penalty(images: Float[Tensor, "b c h w"], logits: Float[Tensor, "b *n"]) -> Float[Tensor, ""]:
    """Mean over images of half the squared norm of the gradient of an image's mean logit; differentiable."""
    (gradient,) = torch.autograd.grad(logits.flatten(1).mean(1).sum(), images, create_graph=True)
    return 0.5 * gradient.square().flatten(1).sum(1).mean()


def adaptive_weight(reconstruction: Tensor, adversarial: Tensor, last_layer: Tensor, limit: float = 1e4) -> Tensor:
    """Norm of the reconstruction gradient at the last weight over that of the adversarial one, in [0, limit]."""
    (wanted,) = torch.autograd.grad(reconstruction, last_layer, retain_graph=True)
    (given,) = torch.autograd.grad(adversarial, last_layer, retain_graph=True)
    return (wanted.norm() / (given.norm() + 1e-4)).clamp(0.0, limit).detach()
