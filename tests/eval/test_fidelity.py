"""Text and faces: found in originals, lost by blur; edit distance and overlap by hand."""

import math
import shutil
import sys
from types import SimpleNamespace

import pytest
import torch
from PIL import Image, ImageChops, ImageDraw, ImageFilter

from tokenizers_mm._images import image_to_tensor
from tokenizers_mm.data.photographs import photographs
from tokenizers_mm.eval.base import Batch, Setup
from tokenizers_mm.eval.fidelity import EyeDistance, FaceRecall, TextError, edit_distance, overlap
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


def portrait() -> Image.Image:
    return photographs("train")["astronaut.png"].resize((256, 256))


def test_eyes_move_with_the_face_and_are_lost_by_blur() -> None:
    pytest.importorskip("cv2", reason="the package opencv-python-headless carries the cascades")
    grey = Image.new("RGB", (256, 256), "grey")
    values = {}
    for name, made in {
        "same": portrait(),
        "soft": portrait().filter(ImageFilter.GaussianBlur(1)),
        "moved": ImageChops.offset(portrait(), 3, 0),
        "blurred": portrait().filter(ImageFilter.GaussianBlur(8)),
        "gone": grey,
    }.items():
        metric = EyeDistance(Setup(PROTOCOLS["default"]))
        pair = [torch.stack([image_to_tensor(image), image_to_tensor(grey)]) for image in (portrait(), made)]
        metric.update(Batch(pair[0], pair[1]))
        values[name], none = metric.values
        assert math.isnan(none), "no face, nothing to say"
    assert values["same"] == 0 < values["soft"] < 0.1
    assert values["soft"] < values["moved"] < 0.4
    assert values["blurred"] > 0.5
    assert values["gone"] == 1


def test_packages_that_are_missing_are_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    fifth = SimpleNamespace(__version__="5.0.0", data=SimpleNamespace(haarcascades="/nowhere"))
    for module, stands_in, cls, message in (
        ("cv2", None, EyeDistance, "eye_distance: expected the package opencv-python-headless below version 5 to be"),
        ("cv2", fifth, EyeDistance, "which carries its cascades, got OpenCV 5.0.0 without"),
        ("skimage", None, FaceRecall, "face_recall: expected the package scikit-image to be installed"),
    ):
        monkeypatch.setitem(sys.modules, module, stands_in)
        with pytest.raises(ValueError, match=message):
            cls(Setup(PROTOCOLS["default"]))
        monkeypatch.undo()


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
