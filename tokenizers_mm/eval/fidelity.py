"""Fidelity of what people look at first, by programs that are installed or not: text (tesseract) and faces (OpenCV)."""

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
    """Share of the faces that OpenCV's detector finds in an original and finds again in the reconstruction."""

    name, label, better, default, partial = "face_recall", "face recall (OpenCV)", "higher", False, True
    needs = "the package opencv-python-headless with its Haar cascades"

    def __init__(self, setup: Setup) -> None:
        super().__init__(setup)
        try:
            import cv2  # optional

            path = Path(cv2.data.haarcascades) / "haarcascade_frontalface_default.xml"
            self._detector: Any = cv2.CascadeClassifier(str(path))
        except (ImportError, AttributeError) as error:
            fail(self.name, self.needs, f"{type(error).__name__}: {error}")
        if self._detector.empty():
            fail(self.name, self.needs, f"no cascade {path}")

    def scores(self, batch: Batch) -> Tensor:
        found = []
        for truth, seen in zip(*batch.once(self.name, lambda images: [self._faces(x) for x in images]), strict=True):
            again = sum(any(overlap(box, other) >= OVERLAP for other in seen) for box in truth)
            found.append(again / len(truth) if truth else math.nan)
        return torch.tensor(found, dtype=torch.float64)

    def _faces(self, x: Tensor) -> list[Sequence[int]]:
        grey = np.asarray(tensor_to_images(x[None])[0].convert("L"))
        return [tuple(int(v) for v in box) for box in self._detector.detectMultiScale(grey, 1.1, 5, minSize=(24, 24))]


def overlap(a: Sequence[int], b: Sequence[int]) -> float:
    """Intersection over union of two boxes (left, top, width, height)."""
    width = min(a[0] + a[2], b[0] + b[2]) - max(a[0], b[0])
    height = min(a[1] + a[3], b[1] + b[3]) - max(a[1], b[1])
    common = max(0, width) * max(0, height)
    return common / (a[2] * a[3] + b[2] * b[3] - common)
