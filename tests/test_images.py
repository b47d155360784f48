"""Images in: every mode, size and state of a file that people have."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from tokenizers_mm import _images


def test_pixels_survive_the_round_trip() -> None:
    array = np.arange(256, dtype=np.uint8).reshape(16, 16, 1).repeat(3, 2)
    x = _images.image_to_tensor(Image.fromarray(array))
    assert (float(x.min()), float(x.max())) == (-1.0, 1.0)
    assert np.array_equal(np.asarray(_images.tensor_to_images(x[None])[0]), array)
    far = _images.tensor_to_images(torch.full((1, 3, 2, 2), 7.0))[0]
    assert far.getpixel((0, 0)) == (255, 255, 255)
    with pytest.raises(ValueError, match="x: expected finite values"):
        _images.tensor_to_images(torch.full((1, 3, 2, 2), torch.nan))


def test_modes_become_rgb_and_sixteen_bits_are_scaled(tmp_path: Path) -> None:
    Image.fromarray(np.full((4, 4), 65535, dtype=np.uint16)).save(tmp_path / "deep.png")
    assert _images.read_image(tmp_path / "deep.png").getpixel((0, 0)) == (255, 255, 255)
    Image.new("RGBA", (4, 4), (255, 0, 0, 0)).save(tmp_path / "clear.png")
    assert _images.read_image(tmp_path / "clear.png").getpixel((0, 0)) == (255, 255, 255)
    Image.new("P", (4, 4)).save(tmp_path / "palette.png")
    assert _images.read_image(tmp_path / "palette.png").mode == "RGB"


def test_huge_pictures_are_refused_before_they_are_decoded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Image.new("RGB", (100, 100)).save(tmp_path / "big.png")
    monkeypatch.setattr(_images, "MAX_PIXELS", 9999)
    with pytest.raises(ValueError, match="at most 9999 pixels, got 100 x 100"):
        _images.read_image(tmp_path / "big.png")
