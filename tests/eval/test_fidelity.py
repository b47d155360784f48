"""Text and faces: found in originals, lost by blur; edit distance and overlap by hand."""

import math
import shutil

import pytest
import torch
from PIL import Image, ImageDraw, ImageFilter

from tokenizers_mm._images import image_to_tensor
from tokenizers_mm.data.photographs import photographs
from tokenizers_mm.eval.base import Batch, Setup
from tokenizers_mm.eval.fidelity import FaceRecall, TextError, edit_distance, overlap
from tokenizers_mm.eval.protocols import PROTOCOLS


def batch(images: list[Image.Image], blur: float) -> Batch:
    made = [image.filter(ImageFilter.GaussianBlur(blur)) if blur else image for image in images]
    originals, reconstructions = (torch.stack([image_to_tensor(image) for image in side]) for side in (images, made))
    return Batch(originals, reconstructions)


def test_edit_distance_and_overlap() -> None:
    assert edit_distance("kitten", "sitting") == 3
    assert edit_distance("", "ab") == edit_distance("ab", "") == 2
    assert overlap((0, 0, 10, 10), (5, 0, 10, 10)) == pytest.approx(50 / 150)
    assert overlap((0, 0, 10, 10), (20, 20, 5, 5)) == 0


def test_faces_are_lost_by_blur() -> None:
    pytest.importorskip("skimage", reason="the detector is scikit-image's")
    images = [photographs("train")["astronaut.png"].resize((256, 256)), Image.new("RGB", (256, 256), "grey")]
    for blur, expected in ((0.0, 1.0), (1.0, 1.0), (5.0, 0.0)):
        metric = FaceRecall(Setup(PROTOCOLS["default"]))
        metric.update(batch(images, blur))
        assert metric.values[0] == expected
        assert math.isnan(metric.values[1]), "no face, nothing to say"
        assert metric.result() == expected


def test_text_is_lost_by_blur() -> None:
    if shutil.which("tesseract") is None:
        with pytest.raises(ValueError, match="text_error: expected the program tesseract to be installed"):
            TextError(Setup(PROTOCOLS["default"]))
        pytest.skip("the program tesseract is not installed; its sentence was tested")
    page = Image.new("RGB", (420, 96), "white")
    pen = ImageDraw.Draw(page)
    for line, text in enumerate(("Visual tokenizers carry", "meaning and pixels at once")):
        pen.text((16, 12 + 36 * line), text, fill="black", font_size=26)
    results = []
    for blur in (0.0, 6.0):
        metric = TextError(Setup(PROTOCOLS["default"]))
        metric.update(batch([page, Image.new("RGB", page.size, "white")], blur))
        assert math.isnan(metric.values[1])
        results.append(metric.result())
    assert results[0] == 0.0
    assert results[1] is not None
    assert results[1] > 0.5
