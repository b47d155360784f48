"""Muon: momentum steps made orthogonal (Jordan et al., 2024, https://kellerjordan.github.io/posts/muon/), in float32.

`torch.optim.Muon` computes the same in bfloat16, which is several times slower on processors without bfloat16 units.
"""

from collections.abc import Iterable

import torch
from torch import Tensor, nn

COEFFICIENTS = (3.4445, -4.7750, 2.0315)
STEPS, MOMENTUM = 5, 0.95


class Muon(torch.optim.Optimizer):
    """Optimizer for matrices [A, B]; the rate of a tall one is larger by sqrt(A / B). Decay is decoupled."""

    def __init__(self, parameters: Iterable[nn.Parameter], lr: float, weight_decay: float) -> None:
        super().__init__(parameters, {"lr": lr, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            alike: dict[torch.Size, list[nn.Parameter]] = {}
            for parameter in group["params"]:
                if parameter.grad is not None:
                    alike.setdefault(parameter.shape, []).append(parameter)
            for (rows, columns), parameters in alike.items():
                updates = orthogonal(torch.stack([self._direction(parameter) for parameter in parameters]))
                for parameter, update in zip(parameters, updates, strict=True):
                    parameter.mul_(1 - group["lr"] * group["weight_decay"])
                    parameter.add_(update, alpha=-group["lr"] * max(1.0, rows / columns) ** 0.5)

    def _direction(self, parameter: nn.Parameter) -> Tensor:
        """Gradient with Nesterov momentum."""
        assert parameter.grad is not None
        mean = self.state[parameter].setdefault("mean", torch.zeros_like(parameter))
        mean.lerp_(parameter.grad, 1 - MOMENTUM)
        return parameter.grad.lerp(mean, MOMENTUM)


def orthogonal(matrices: Tensor) -> Tensor:
    """Matrices [N, A, B] with their singular values brought near 1, by a Newton-Schulz iteration of degree 5.

    Every factor of the iteration is a polynomial in the Gram matrix of the shorter side, so the product of the factors
    is formed there and applied once.
    """
    a, b, c = COEFFICIENTS
    tall = matrices.shape[1] > matrices.shape[2]
    x = matrices.mT if tall else matrices
    x = x / torch.linalg.vector_norm(x, dim=(1, 2), keepdim=True).clamp_min(1e-7)
    gram, product = x @ x.mT, None
    for _ in range(STEPS):
        factor = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        factor.diagonal(dim1=1, dim2=2).add_(a)
        product = factor if product is None else factor @ product
        gram = factor @ (factor @ gram)
    assert product is not None
    x = product @ x
    return x.mT if tall else x
