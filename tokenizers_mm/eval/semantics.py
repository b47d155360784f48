"""Linear probes: what a linear map can read from frozen features."""

import torch
import torch.nn.functional as F
from torch import Tensor

from tokenizers_mm._check import require


def linear_probe(
    train: tuple[Tensor, Tensor], test: tuple[Tensor, Tensor], num_classes: int, decay: float = 1e-2
) -> Tensor:
    """Hits, bool [N], on `test` of a softmax regression fitted on `train`; each is (features [N, D], labels int64 [N]).

    Features are standardised with the training statistics; the L2-regularised loss is minimised to convergence by
    L-BFGS from zero, so the result has no randomness.
    """
    features, labels = train[0].double(), train[1]
    require(len(features) == len(labels) > 0, "train", "features [N, D] and labels [N]", features)
    mean, std = features.mean(0), features.std(0).clamp_min(1e-6)
    features, tested = (features - mean) / std, (test[0].double() - mean) / std
    weight = torch.zeros(features.shape[1], num_classes, dtype=torch.float64, requires_grad=True)
    bias = torch.zeros(num_classes, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([weight, bias], max_iter=100, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        optimizer.zero_grad()
        value = F.cross_entropy(features @ weight + bias, labels) + 0.5 * decay * weight.square().sum()
        value.backward()
        return value

    optimizer.step(loss)  # pyright: ignore[reportArgumentType]
    with torch.no_grad():
        predicted = (tested @ weight + bias).argmax(1)
    return predicted == test[1]
