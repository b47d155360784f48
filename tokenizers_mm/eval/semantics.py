"""What can be read from frozen features: linear probes and nearest neighbours."""

import math
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from tokenizers_mm._check import require
from tokenizers_mm.eval.base import Batch, Metric, Setup, stored


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


def nearest_neighbours(features: Tensor, labels: Tensor, neighbours: int = 10) -> Tensor:
    """Hits, bool [N], of a vote of the nearest others by cosine similarity, each weighted by exp(similarity / 0.07).

    features [N, D]; labels int64 [N].
    """
    features = torch.nn.functional.normalize(features.double(), dim=1)
    classes, hits = int(labels.max()) + 1, []
    for start in range(0, len(features), 256):
        rows = slice(start, start + 256)
        similar = features[rows] @ features.T
        places = torch.arange(start, start + len(similar))
        similar[torch.arange(len(similar)), places] = -math.inf
        best, index = similar.topk(min(neighbours, len(features) - 1), dim=1)
        votes = torch.zeros(len(similar), classes, dtype=torch.float64)
        votes.scatter_add_(1, labels[index], (best / 0.07).exp())
        hits.append(votes.argmax(1) == labels[rows])
    return torch.cat(hits)


class _Labelled(Metric):
    """What the tokenizer's own features say about the classes of images: the folders that they stand in."""

    better, default, reads_features = "higher", False, True
    needs = "a tokenizer with features, and images in one folder per class"

    def __init__(self, setup: Setup) -> None:
        super().__init__(setup)
        self.features, self.labels = torch.zeros(0, 0), torch.zeros(0, dtype=torch.int64)

    def update(self, batch: Batch) -> None:
        require(batch.features is not None, self.name, "a tokenizer with features", "none")
        assert batch.features is not None
        features = batch.features.float().cpu()
        self.features = torch.cat([self.features, features]) if len(self.features) else features
        self.labels = torch.cat([self.labels, torch.tensor(list(batch.labels), dtype=torch.int64)])

    def checked(self) -> tuple[Tensor, Tensor]:
        """Features and labels; ValueError where there are no two classes with two images each."""
        counts = torch.bincount(self.labels.clamp_min(0))
        known = bool((self.labels >= 0).all()) and len(counts) > 1 and int(counts.min()) > 1
        require(known, self.name, "images in folders, two or more classes with two or more images each", "others")
        return self.features, self.labels

    def state(self) -> dict[str, Tensor]:
        return {"features": self.features, "labels": self.labels}

    def restore(self, state: Mapping[str, Tensor]) -> None:
        self.features = stored(state, "features", torch.float32, 2)
        self.labels = stored(state, "labels", torch.int64, 1)
        require(len(self.features) == len(self.labels), "state.labels", f"{len(self.features)}", len(self.labels))


class NearestNeighbours(_Labelled):
    """Accuracy of ten nearest neighbours among the other images, by the tokenizer's features (means over tokens)."""

    name, label = "knn", "10-NN accuracy"

    def result(self) -> float:
        return float(nearest_neighbours(*self.checked()).double().mean())


class LinearProbe(_Labelled):
    """Accuracy of a linear probe on half of the images, fitted on the other half; a seeded split."""

    name, label = "linear_probe", "linear probe accuracy"

    def result(self) -> float:
        features, labels = self.checked()
        order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(self.setup.seed))
        train, test = order[::2], order[1::2]
        hits = linear_probe((features[train], labels[train]), (features[test], labels[test]), int(labels.max()) + 1)
        return float(hits.double().mean())
