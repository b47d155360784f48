"""Fidelity of text, by tesseract where it is installed, and of faces, by a detector that scikit-image carries."""

import math
import os
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tokenizers_mm._check import fail
from tokenizers_mm._images import tensor_to_images
from tokenizers_mm.eval.base import Batch, PerImage, Setup

LEAST_TEXT = 8
"""Characters that tesseract must read in an original for the image to count."""

SMALLEST_FACE = 24
"""Pixels along the side of the smallest face that is looked for."""

OVERLAP = 0.5
"""Intersection over union from which two boxes are the same face."""


class TextError(PerImage):
    """Character error rate of what tesseract reads in a reconstruction, against what it reads in the original."""

    name, label, better, default, partial = "text_error", "text error rate (tesseract)", "lower", False, True
    needs = "the program tesseract"

    def __init__(self, setup: Setup) -> None:
        super().__init__(setup)
        if shutil.which("tesseract") is None:
            fail(self.name, "the program tesseract to be installed", "no such program")

    def scores(self, batch: Batch) -> Tensor:
        found = []
        for truth, text in zip(*batch.once(self.name, lambda images: [read_text(x) for x in images]), strict=True):
            enough = len(truth) >= LEAST_TEXT
            found.append(edit_distance(truth, text) / len(truth) if enough else math.nan)
        return torch.tensor(found, dtype=torch.float64)


def read_text(x: Tensor) -> str:
    """What tesseract reads in an image [3, H, W] in [-1, 1], white space as single blanks."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "image.png"
        tensor_to_images(x[None])[0].save(path)
        command = ["tesseract", str(path), "stdout", "--psm", "6"]
        single = {**os.environ, "OMP_THREAD_LIMIT": "1"}  # several threads are slower for small images
        result = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=60, env=single)
    return " ".join(result.stdout.split())


def edit_distance(a: str, b: str) -> int:
    """Levenshtein distance of two texts."""
    row = list(range(len(b) + 1))
    for i, left in enumerate(a, 1):
        previous, row[0] = row[0], i
        for j, right in enumerate(b, 1):
            previous, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, previous + (left != right))
    return row[-1]


class FaceRecall(PerImage):
    """Share of the faces that a detector finds in an original and finds again, in their places, in the reconstruction.

    The detector is OpenCV's cascade of local binary patterns for frontal faces, which scikit-image carries.
    """

    name, label, better, default, partial = "face_recall", "face recall (LBP cascade)", "higher", False, True
    needs, least = "the package scikit-image", SMALLEST_FACE

    def __init__(self, setup: Setup) -> None:
        super().__init__(setup)
        from skimage import data, feature  # an extra: loaded when asked for

        self._detector: Any = feature.Cascade(data.lbp_frontal_face_cascade_filename())

    def scores(self, batch: Batch) -> Tensor:
        found = []
        for truth, seen in zip(*batch.once(self.name, lambda images: [self._faces(x) for x in images]), strict=True):
            again = sum(any(overlap(box, other) >= OVERLAP for other in seen) for box in truth)
            found.append(again / len(truth) if truth else math.nan)
        return torch.tensor(found, dtype=torch.float64)

    def _faces(self, x: Tensor) -> list[Sequence[int]]:
        """Boxes (left, top, width, height)."""
        image = np.asarray(tensor_to_images(x[None])[0])
        sides = {"min_size": (SMALLEST_FACE,) * 2, "max_size": image.shape[:2]}
        found = self._detector.detect_multi_scale(img=image, scale_factor=1.2, step_ratio=1, **sides)
        return [(face["c"], face["r"], face["width"], face["height"]) for face in found]


def overlap(a: Sequence[int], b: Sequence[int]) -> float:
    """Intersection over union of two boxes (left, top, width, height)."""
    width = min(a[0] + a[2], b[0] + b[2]) - max(a[0], b[0])
    height = min(a[1] + a[3], b[1] + b[3]) - max(a[1], b[1])
    common = max(0, width) * max(0, height)
    return common / (a[2] * a[3] + b[2] * b[3] - common)
