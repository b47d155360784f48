"""rFID: the Frechet distance between originals and reconstructions, through torch-fidelity and a local weights file."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from tokenizers_mm._check import fail, require

INCEPTION_FILE = "weights-inception-2015-12-05-6726825d.pth"
"""The TensorFlow Inception weights as torch-fidelity names them."""


class _Images(Dataset[Tensor]):
    def __init__(self, images: Sequence[Tensor]) -> None:
        self.images = images

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> Tensor:
        return self.images[index].float().mul(127.5).add(128).clamp(0, 255).to(torch.uint8)


def rfid(originals: Sequence[Tensor], reconstructions: Sequence[Tensor], weights: str | Path | None = None) -> float:
    """rFID of two lists of images [3, H, W] in [-1, 1] with torch-fidelity's Inception (`inception-v3-compat`).

    weights: its weights file; None looks in torch.hub's cache. Nothing is downloaded. The originals given here are the
    reference set, so the number is comparable only within one protocol.
    """
    path = Path(weights) if weights else Path(torch.hub.get_dir()) / "checkpoints" / INCEPTION_FILE
    if not path.is_file():
        fail("rfid weights", f"the Inception weights {INCEPTION_FILE}", f"no file {path}")
    return frechet(originals, reconstructions, feature_extractor_weights_path=str(path))


def frechet(originals: Sequence[Tensor], reconstructions: Sequence[Tensor], **options: Any) -> float:
    """The same with torch-fidelity's own options (another registered feature extractor, say)."""
    from torch_fidelity import calculate_metrics  # an extra: loaded when asked for

    require(
        len(originals) == len(reconstructions) > 1,
        "images",
        "two equally long lists",
        (len(originals), len(reconstructions)),
    )
    calculate: Callable[..., dict[str, float]] = calculate_metrics
    defaults = {"fid": True, "cuda": torch.cuda.is_available(), "verbose": False, "cache": False, "save_cpu_ram": True}
    result = calculate(input1=_Images(originals), input2=_Images(reconstructions), **{**defaults, **options})
    return float(result["frechet_inception_distance"])
