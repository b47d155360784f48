"""Metrics of frozen features: linear probes, nearest neighbours, classes and captions by a text tower."""

import json
import math
from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from tokenizers_mm._check import require
from tokenizers_mm.eval.base import Batch, Metric, Setup, stored
from tokenizers_mm.eval.towers import open_tower

TEMPLATES = ("a photo of a {}.", "an image of a {}.", "a {}.")
"""Sentences for the name of a class, whose embeddings are averaged."""

RANKS = (1, 5, 10)
"""Ranks of recall."""


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
    features = F.normalize(features.double(), dim=1)
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


class _Rows:
    """Rows of a tensor that come batch by batch and are joined when they are read, not copied for every batch."""

    def __init__(self, empty: Tensor) -> None:
        """empty: [0, ...], what no rows are."""
        self._parts = [empty]

    def add(self, rows: Tensor) -> None:
        self._parts += [rows] if len(rows) else []

    def joined(self) -> Tensor:
        parts = [part for part in self._parts if len(part)] or self._parts[:1]
        self._parts = [torch.cat(parts)]
        return self._parts[0]


def _no_features() -> _Rows:
    return _Rows(torch.zeros(0, 0))


class _Features(Metric):
    """A metric of vectors of all images, and of what is known of each image, kept until the end."""

    better: ClassVar[Literal["higher"]] = "higher"
    default = False

    def __init__(self, setup: Setup) -> None:
        super().__init__(setup)
        self._features, self._labels = _no_features(), _Rows(torch.zeros(0, dtype=torch.int64))
        self._found: tuple[int, dict[str, float], list[float]] = 0, {}, []

    @abstractmethod
    def measure(self) -> tuple[dict[str, float], Tensor]:
        """Entries beside the mean, "chance" among them, and one number per image, NaN for those left out."""

    @property
    def features(self) -> Tensor:
        """Vectors of all images, [N, C]."""
        return self._features.joined()

    @property
    def labels(self) -> Tensor:
        """Class of each image, [N]."""
        return self._labels.joined()

    def take(self, features: Tensor, batch: Batch) -> None:
        """Keep vectors [B, C], and the classes of their images."""
        self._features.add(features.float().cpu())
        self._labels.add(torch.tensor(list(batch.labels), dtype=torch.int64))

    def _measured(self) -> tuple[dict[str, float], list[float]]:
        """`measure`, once for the same images."""
        count = len(self.features)
        if self._found[0] != count or not count:
            entries, values = self.measure()
            mean = float(values[values.isfinite()].double().mean())
            self._found = count, {"mean": mean, **entries}, values.double().tolist()
        return self._found[1:]

    def result(self) -> dict[str, float]:
        return self._measured()[0]

    def per_image(self) -> Sequence[float]:
        return self._measured()[1]

    def state(self) -> dict[str, Tensor]:
        return {"features": self.features, "labels": self.labels}

    def restore(self, state: Mapping[str, Tensor]) -> None:
        self._features = _Rows(stored(state, "features", torch.float32, 2))
        self._labels = _Rows(stored(state, "labels", torch.int64, 1))


class _Labelled(_Features):
    """Base of the metrics that tell classes of images from the tokenizer's own features."""

    reads_features = True
    needs = "a tokenizer with features, and images with classes (folders, or `scenes`)"

    def update(self, batch: Batch) -> None:
        require(batch.features is not None, self.name, "a tokenizer with features", "none")
        assert batch.features is not None
        self.take(batch.features, batch)

    def measure(self) -> tuple[dict[str, float], Tensor]:
        counts = torch.bincount(self.labels.clamp_min(0))
        counts = counts[counts > 0]
        known = bool((self.labels >= 0).all()) and len(counts) > 1 and int(counts.min()) > 1
        require(known, self.name, "images in folders, two or more classes with two or more images each", "others")
        return {"chance": most_frequent(self.labels)}, self.hits()

    @abstractmethod
    def hits(self) -> Tensor:
        """1 or 0 per image, NaN for those left out."""


class NearestNeighbours(_Labelled):
    """Accuracy of ten nearest neighbours among the other images, by the tokenizer's features (means over tokens)."""

    name, label = "knn", "10-NN accuracy"

    def hits(self) -> Tensor:
        return nearest_neighbours(self.features, self.labels).double()


class LinearProbe(_Labelled):
    """Accuracy of a linear probe on half of the images, fitted on the other half; a seeded split."""

    name, label = "linear_probe", "linear probe accuracy"

    def hits(self) -> Tensor:
        features, labels = self.features, self.labels
        order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(self.setup.seed))
        train, test = order[::2], order[1::2]
        hits = linear_probe((features[train], labels[train]), (features[test], labels[test]), int(labels.max()) + 1)
        found = torch.full((len(labels),), torch.nan, dtype=torch.float64)
        found[test] = hits.double()
        return found


class _Told(_Features):
    """Base of the metrics with embeddings of images and texts by one tower, of CLIP's kind or the tokenizer's own.

    A tower of images sees the reconstructions, and the originals, whose value is the entry "originals". The tokenizer's
    own reads the semantic features that are decoded from the codes of the originals.
    """

    needs = "a tower of images and texts (tower)"

    def __init__(self, setup: Setup) -> None:
        super().__init__(setup)
        require(setup.tower is not None or "tower" in setup.weights, self.name, "a tower of images and texts", "none")
        self.tower = setup.tower or open_tower(setup.weights["tower"], setup.device)
        self.reads_semantic = self.tower.reads_semantic
        self._truth = _no_features()

    def update(self, batch: Batch) -> None:
        if self.reads_semantic:
            require(batch.semantic is not None, self.name, "a tokenizer with a semantic decoder", "none")
            assert batch.semantic is not None
            self.take(self.tower.images(batch.semantic), batch)
            return
        truth, made = batch.once("tower", self.tower.images)
        self.take(made, batch)
        self._truth.add(truth)

    def sides(self) -> Iterator[tuple[str, Tensor]]:
        """Normalised embeddings [N, D] by the name of their side."""
        yield "", F.normalize(self.features, dim=1)
        if len(truth := self._truth.joined()):
            yield "originals", F.normalize(truth, dim=1)

    def state(self) -> dict[str, Tensor]:
        return super().state() | {"truth": self._truth.joined()}

    def restore(self, state: Mapping[str, Tensor]) -> None:
        super().restore(state)
        self._truth = _Rows(stored(state, "truth", torch.float32, 2))


class ZeroShot(_Told):
    """Accuracy of the class whose name is nearest to an image, names in the sentences of TEMPLATES (2103.00020, 3.1).

    chance: the accuracy of the most frequent class, as of the other metrics with classes.
    """

    name, label = "zero_shot", "zero-shot accuracy"

    def __init__(self, setup: Setup) -> None:
        super().__init__(setup)
        require(len(setup.classes) > 1, self.name, "images with classes (folders, or `scenes`)", "none")

    def measure(self) -> tuple[dict[str, float], Tensor]:
        require(len(self.labels) > 0, self.name, "at least one image", "none")
        names = [name.replace("_", " ").replace("/", " ") for name in self.setup.classes]
        each = [F.normalize(self.tower.texts([form.format(name) for name in names]), dim=1) for form in TEMPLATES]
        classes = F.normalize(torch.stack(each).mean(0), dim=1)
        hits = {side: ((seen @ classes.T).argmax(1) == self.labels).double() for side, seen in self.sides()}
        entries = {side: float(values.mean()) for side, values in hits.items() if side}
        return {"chance": most_frequent(self.labels), **entries}, hits[""]


class Retrieval(_Told):
    """Recall of captions by images, and of images by captions, among those of the run.

    The mean is image-to-text recall@1; other entries are those at 5 and 10, and the same for "text_to_image". Images
    without a caption are left out; equal captions are one, and any image of it is right. Where several candidates are
    as near as the right one, the value is the chance that a random order puts it among the first.
    """

    name, label = "retrieval", "image-to-text recall@1"

    def __init__(self, setup: Setup) -> None:
        super().__init__(setup)
        self.captions: list[str] = []

    def update(self, batch: Batch) -> None:
        super().update(batch)
        self.captions += batch.captions or [""] * len(batch.originals)

    def measure(self) -> tuple[dict[str, float], Tensor]:
        told = [index for index, caption in enumerate(self.captions) if caption]
        different = list(dict.fromkeys(self.captions[index] for index in told))
        require(len(different) > 1, self.name, "images with two or more different captions", len(different))
        numbers = {caption: number for number, caption in enumerate(different)}
        owner = torch.tensor([numbers[self.captions[index]] for index in told])
        texts = F.normalize(self.tower.texts(different), dim=1)
        entries, values = {"chance": 1 / len(different)}, torch.full((len(self.captions),), torch.nan).double()
        right = F.one_hot(owner, len(different)).bool()
        for side, seen in self.sides():
            similar = seen[told] @ texts.T
            for direction, table, mask in (("", similar, right), ("text_to_image", similar.T, right.T)):
                for first in RANKS:
                    recall = recall_at(table, mask, first)
                    if (side, direction, first) == ("", "", 1):
                        values[told] = recall
                    else:
                        parts = (side, direction, f"recall_{first}" if first > 1 or direction else "")
                        entries["_".join(part for part in parts if part)] = float(recall.mean())
        return entries, values

    def state(self) -> dict[str, Tensor]:
        text = json.dumps(self.captions).encode()
        return super().state() | {"captions": torch.frombuffer(bytearray(text), dtype=torch.uint8)}

    def restore(self, state: Mapping[str, Tensor]) -> None:
        super().restore(state)
        found = json.loads(stored(state, "captions", torch.uint8, 1).numpy().tobytes())
        texts = isinstance(found, list) and all(isinstance(text, str) for text in found)
        require(texts and len(found) == len(self.features), "state.captions", "a text for each image", "others")
        self.captions = found


def recall_at(similar: Tensor, right: Tensor, first: int) -> Tensor:
    """Chance, float64 [N], that a right one is among the `first` most similar, in random order where they are equal.

    similar: [N, M]. right: bool [N, M], at least one in each row.
    """
    best = similar.masked_fill(~right, -math.inf).amax(1, keepdim=True)
    before = (similar > best).sum(1)
    equal = similar == best
    wrong, ours = (equal & ~right).sum(1).double(), (equal & right).sum(1).double()
    places = (first - before).clamp_min(0).double()
    # chance that the first `places` of a random order of wrong + ours hold one of ours
    missed = torch.ones_like(places)
    for place in range(min(first, similar.shape[1])):
        left = (wrong - place).clamp_min(0) / (wrong + ours - place).clamp_min(1)
        missed = torch.where(place < places, missed * left, missed)
    return 1 - missed


def most_frequent(labels: Tensor) -> float:
    """Accuracy of the answer that is right most often."""
    return float(torch.bincount(labels.clamp_min(0)).max()) / len(labels)
