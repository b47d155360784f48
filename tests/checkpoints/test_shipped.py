"""The tokenizer that comes with the package: found offline, small, and as good as its card says."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

import tokenizers_mm as tmm
from tokenizers_mm._images import image_to_tensor
from tokenizers_mm.checkpoints.store import SHIPPED, shipped
from tokenizers_mm.cli import main
from tokenizers_mm.data.photographs import fixed_crops
from tokenizers_mm.eval.image import psnr
from tokenizers_mm.eval.validation import reconstruct

NAME = "tokenizers_mm/demo-64"


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("the hub was asked")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", refuse)


def test_it_is_small_and_found_by_name(offline: None) -> None:
    assert NAME in shipped()
    folder = SHIPPED / "demo-64"
    assert sum(path.stat().st_size for path in folder.iterdir()) <= 8 * 1000**2
    tokenizer = tmm.load(NAME)
    (stream,) = tokenizer.streams(64, 64)
    assert stream.num_ids <= 128
    assert stream.codebook_size <= 1 << 12
    assert tokenizer.provenance.license == "Apache-2.0"


def test_an_unknown_name_is_told_what_there_is(offline: None) -> None:
    with pytest.raises(ValueError, match=r"source: expected one of the shipped tokenizers \['tokenizers_mm/demo-64'\]"):
        tmm.load("tokenizers_mm/nothing")


def test_its_card_is_true(one_thread: None) -> None:
    tokenizer = tmm.load(NAME)
    card = (SHIPPED / "demo-64" / "README.md").read_text(encoding="utf-8")
    said = re.search(r"PSNR of (\d+) crops \| ([\d.]+) dB", card)
    assert said is not None
    crops = torch.stack([image_to_tensor(crop) for crop in fixed_crops("heldout", int(said[1]), 64)])
    measured = float(psnr(crops, reconstruct(tokenizer, crops)[0]).mean())
    assert measured == pytest.approx(float(said[2]), abs=0.02)
    assert measured >= 27.0
    with Image.open(SHIPPED / "demo-64" / "card.png") as image:
        assert image.width > 500


def test_ids_of_a_photograph_come_back_as_the_photograph(one_thread: None) -> None:
    tokenizer = tmm.load(NAME)
    crop = fixed_crops("heldout", 3, 64)[2]
    codes = tokenizer.encode(crop)
    again = tokenizer.decode_ids(codes.ids).detach()
    assert float(psnr(image_to_tensor(crop)[None], again.clamp(-1, 1))) > 20
    assert tokenizer.features(codes).shape == (1, 64, 32)


def test_the_command_line_needs_an_image_only(
    offline: None, one_thread: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    fixed_crops("heldout", 1, 90)[0].save("image.png")
    assert main(["encode", "image.png"]) == 0
    assert main(["decode", "ids.safetensors"]) == 0
    with Image.open(tmp_path / "decoded" / "image.png") as image:
        assert image.size == (64, 64)
    assert main(["encode", "image.png", "--fit", "refuse"]) == 2
