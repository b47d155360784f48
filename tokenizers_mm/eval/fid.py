"""Feature extractors of torch-fidelity with a local file of weights, for rFID, KID and inception score."""

import pickle
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tokenizers_mm._check import fail, require
from tokenizers_mm._images import to_bytes
from tokenizers_mm.functional.frechet import Moments, frechet_distance

INCEPTION_FILE = "weights-inception-2015-12-05-6726825d.pth"
"""The TensorFlow Inception weights as torch-fidelity names them."""


class FeatureExtractor:
    """A feature extractor of torch-fidelity: images in [-1, 1], as bytes -> features [B, D], float64 on the CPU.

    measure: whose layer is read, "fid", "kid" or "isc".
    """

    def __init__(self, measure: str = "fid", weights: str | Path | None = None, **options: Any) -> None:
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
        layer = utils.resolve_feature_layer_for_metric(measure, **{measure: True}, **options)
        self.name = str(utils.resolve_feature_extractor(**{measure: True}, **options))
        self._extract: Any = utils.create_feature_extractor(self.name, [layer], **options)
        self._device = "cuda" if options["cuda"] else "cpu"

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Tensor:
        return self._extract(to_bytes(images).to(self._device))[0].double().cpu()


@lru_cache(maxsize=3)
def shared_extractor(measure: str, weights: str, extractor: str) -> FeatureExtractor:
    """One extractor for all tokenizers of a run. extractor: a registered name in place of Inception, "" for none."""
    if extractor:
        return FeatureExtractor(measure, feature_extractor=extractor)
    return FeatureExtractor(measure, weights or None)


def distance_of_moments(a: Moments, b: Moments) -> float:
    """Frechet distance of two sets of features; ValueError for fewer than two."""
    require(min(a.count, b.count) > 1, "images", "at least two", min(a.count, b.count))
    return frechet_distance(*a.mean_and_covariance(), *b.mean_and_covariance())


def _require_weights(path: Path) -> None:
    """Refuse a pickle that asks for anything but tensors: torch-fidelity unpickles whatever the file holds."""
    try:
        torch.load(path, map_location="meta", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, OSError, ValueError, TypeError, LookupError) as error:
        fail("rfid weights", "a file of torch.save with nothing but weights", f"{path} ({type(error).__name__})")
