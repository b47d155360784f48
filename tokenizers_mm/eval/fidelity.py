"""Fidelity of text, by tesseract where it is installed, and of faces, by cascades of scikit-image and OpenCV."""

import math
import os
import shutil
import subprocess
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from tokenizers_mm._check import fail, require
from tokenizers_mm._files import temporary_directory
from tokenizers_mm._images import tensor_to_images
from tokenizers_mm.eval.base import Batch, PerImage, Setup

LEAST_TEXT = 8
"""Characters that tesseract must read in an original for the image to count."""

SMALLEST_FACE = 24
"""Pixels along the side of the smallest face that is looked for."""

FACE_SIDE = 192
"""Pixels to which a face is scaled before its eyes are looked for."""

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
    """Text that tesseract reads in an image [3, H, W] in [-1, 1], white space as single blanks."""
    with temporary_directory() as folder:
        path = folder / "image.png"
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
        try:
            from skimage import data, feature  # an extra: loaded when asked for
        except ImportError:
            fail(self.name, "the package scikit-image to be installed", "no such package")
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


class EyeDistance(PerImage):
    """Distance between the eyes of a face in an original and in its reconstruction, over the distance of its two eyes.

    The mean over the faces whose two eyes OpenCV's cascades find in the original. Eyes of the reconstruction are looked
    for in the same box; one that is not found, or is farther off, counts as 1.
    """

    name, label, better, default, partial = "eye_distance", "eye displacement (Haar cascades)", "lower", False, True
    needs, least = "the package opencv-python-headless below version 5", SMALLEST_FACE

    def __init__(self, setup: Setup) -> None:
        super().__init__(setup)
        try:
            cv2: Any = import_module("cv2")  # no extra carries it: loaded when asked for
        except ImportError:
            fail(self.name, f"{self.needs} to be installed", "no such package")
        folder = Path(cv2.data.haarcascades)
        paths = [folder / f"haarcascade_{name}.xml" for name in ("frontalface_default", "eye")]
        carried = hasattr(cv2, "CascadeClassifier") and all(path.is_file() for path in paths)
        require(carried, self.name, f"{self.needs}, which carries its cascades", f"OpenCV {cv2.__version__} without")
        self._faces, self._eyes = (cv2.CascadeClassifier(str(path)) for path in paths)

    def scores(self, batch: Batch) -> Tensor:
        images = (tensor_to_images(side) for side in (batch.originals, batch.reconstructions))
        return torch.tensor([self._moved(*pair) for pair in zip(*images, strict=True)], dtype=torch.float64)

    def _moved(self, original: Image.Image, made: Image.Image) -> float:
        found = []
        for box in self._faces.detectMultiScale(_grey(original), 1.1, 5, minSize=(SMALLEST_FACE,) * 2):
            (left, right), seen = (self.eyes(image, box) for image in (original, made))
            if left is not None and right is not None:
                apart, pairs = math.dist(left, right), zip((left, right), seen, strict=True)
                moved = [1.0 if b is None else min(1.0, math.dist(a, b) / apart) for a, b in pairs]
                found.append(sum(moved) / 2)
        return sum(found) / len(found) if found else math.nan

    def eyes(self, image: Image.Image, box: Sequence[int]) -> list[tuple[float, float] | None]:
        """Centres (x, y) of the left and the right eye in a box (left, top, width, height), None where none is found.

        Looked for in the upper 60 % of the box, scaled to FACE_SIDE pixels; of several in one half, the largest.
        """
        left, top, width, height = map(int, box)
        part = image.crop((left, top, left + width, top + height)).resize(
            (FACE_SIDE, FACE_SIDE), Image.Resampling.BICUBIC
        )
        boxes = self._eyes.detectMultiScale(_grey(part)[: FACE_SIDE * 3 // 5], 1.05, 5, minSize=(FACE_SIDE // 8,) * 2)
        found: list[tuple[float, float] | None] = [None, None]
        for x, y, w, h in sorted(map(tuple, boxes), key=lambda eye: eye[2]):
            centre = float(x + w / 2), float(y + h / 2)
            found[int(centre[0] >= FACE_SIDE / 2)] = centre
        return found


def _grey(image: Image.Image) -> np.ndarray:
    """Luminance, uint8 [H, W]."""
    return np.asarray(image.convert("L"))


def overlap(a: Sequence[int], b: Sequence[int]) -> float:
    """Intersection over union of two boxes (left, top, width, height)."""
    width = min(a[0] + a[2], b[0] + b[2]) - max(a[0], b[0])
    height = min(a[1] + a[3], b[1] + b[3]) - max(a[1], b[1])
    common = max(0, width) * max(0, height)
    return common / (a[2] * a[3] + b[2] * b[3] - common)
