"""rFID: the Frechet distance between originals and reconstructions, through torch-fidelity and a local weights file."""

import pickle
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tokenizers_mm._check import fail, require

INCEPTION_FILE = "weights-inception-2015-12-05-6726825d.pth"
"""The TensorFlow Inception weights as torch-fidelity names them."""


class FrechetDistance:
    """The Frechet distance between originals and reconstructions, accumulated one batch after another.

    Holds the first two moments of the features of each side, in float64; no image and no feature is kept.
    """

    def __init__(self, weights: str | Path | None = None, **options: Any) -> None:
        """torch-fidelity's Inception (`inception-v3-compat`); options: its own (another registered extractor, say).

        weights: the weights file; None looks in torch.hub's cache. Nothing is downloaded.
        """
        if "feature_extractor" not in options:
            path = Path(weights) if weights else Path(torch.hub.get_dir()) / "checkpoints" / INCEPTION_FILE
            if not path.is_file():
                fail("rfid weights", f"the Inception weights {INCEPTION_FILE}", f"no file {path}")
            _require_weights(path)
            options = {**options, "feature_extractor_weights_path": str(path)}
        from torch_fidelity import utils  # an extra: loaded when asked for

        options = {"verbose": False, "cuda": torch.cuda.is_available(), **options}
        layer = utils.resolve_feature_layer_for_metric("fid", **options)
        name = utils.resolve_feature_extractor(fid=True, **options)
        self._extract: Any = utils.create_feature_extractor(name, [layer], **options)
        self._device = "cuda" if options["cuda"] else "cpu"
        self._moments: tuple[list[Tensor], list[Tensor]] = ([], [])
        self._shift: Tensor | None = None
        self._count = 0

    @torch.no_grad()
    def add(self, originals: Tensor, reconstructions: Tensor) -> None:
        """Take images [B, 3, H, W] in [-1, 1] and what was made of them."""
        require(originals.shape == reconstructions.shape, "reconstructions", "one of each original", reconstructions)
        self._count += len(originals)
        for moments, images in zip(self._moments, (originals, reconstructions), strict=True):
            pixels = images.float().mul(127.5).add(128).clamp(0, 255).to(torch.uint8)
            features = self._extract(pixels.to(self._device))[0].double().cpu()
            if self._shift is None:  # near the mean, so that little cancels in the covariance
                self._shift = features.mean(0)
            features = features - self._shift
            new = [features.sum(0), features.T @ features]
            moments[:] = [a + b for a, b in zip(moments, new, strict=True)] if moments else new

    def value(self) -> float:
        """The distance; the originals are the reference set, so it is comparable only within one protocol."""
        from torch_fidelity.metric_fid import KEY_METRIC_FID, fid_statistics_to_metric

        require(self._count > 1, "images", "at least two", self._count)
        sides = []
        for total, squares in self._moments:
            mean = total / self._count
            covariance = (squares - self._count * torch.outer(mean, mean)) / (self._count - 1)
            sides.append({"mu": mean.numpy(), "sigma": covariance.numpy()})
        return float(fid_statistics_to_metric(sides[0], sides[1], False)[KEY_METRIC_FID])


def rfid(originals: Sequence[Tensor], reconstructions: Sequence[Tensor], weights: str | Path | None = None) -> float:
    """rFID of two lists of images [3, H, W] in [-1, 1]; see `FrechetDistance`."""
    return frechet(originals, reconstructions, weights=weights)


def frechet(originals: Sequence[Tensor], reconstructions: Sequence[Tensor], **options: Any) -> float:
    """The same with torch-fidelity's own options (another registered feature extractor, say)."""
    lengths = len(originals), len(reconstructions)
    require(lengths[0] == lengths[1] > 1, "images", "two equally long lists", lengths)
    distance = FrechetDistance(**options)
    for original, reconstruction in zip(originals, reconstructions, strict=True):
        distance.add(original[None], reconstruction[None])
    return distance.value()


def _require_weights(path: Path) -> None:
    """Refuse a pickle that asks for anything but tensors: torch-fidelity unpickles whatever the file holds."""
    try:
        torch.load(path, map_location="meta", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, OSError, ValueError, TypeError, LookupError) as error:
        fail("rfid weights", "a file of torch.save with nothing but weights", f"{path} ({type(error).__name__})")
