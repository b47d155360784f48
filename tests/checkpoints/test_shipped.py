"""The tokenizers that come with the package: found offline, small, and as good as their cards say."""

import dataclasses
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from PIL import Image

import tokenizers_mm as tmm
from tokenizers_mm._images import image_to_tensor
from tokenizers_mm.checkpoints.store import SHIPPED, shipped
from tokenizers_mm.cli import main
from tokenizers_mm.data.photographs import fixed_crops
from tokenizers_mm.eval.image import psnr
from tokenizers_mm.eval.validation import reconstruct
from tokenizers_mm.functional.deblocking import smooth_plain

NAME = "tokenizers_mm/demo-64"


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("the hub was asked")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", refuse)


@pytest.mark.parametrize(("side", "megabytes", "num_ids"), [(64, 8, 128), (256, 8, 1024)])
def test_they_are_small_and_found_by_name(side: int, megabytes: int, num_ids: int, offline: None) -> None:
    name = f"tokenizers_mm/demo-{side}"
    assert name in shipped()
    folder = SHIPPED / f"demo-{side}"
    assert sum(path.stat().st_size for path in folder.iterdir()) <= megabytes * 1000**2
    tokenizer = tmm.load(name)
    (stream,) = tokenizer.streams(side, side)
    assert stream.num_ids <= num_ids
    assert stream.codebook_size <= 1 << 12
    assert tokenizer.provenance.license == "Apache-2.0"


def test_an_unknown_name_is_told_what_there_is(offline: None) -> None:
    with pytest.raises(ValueError, match=r"one of the shipped tokenizers \['tokenizers_mm/demo-256', '"):
        tmm.load("tokenizers_mm/nothing")


@pytest.mark.parametrize(("side", "least"), [(64, 27.0), (256, 25.0)])
def test_their_cards_are_true(side: int, least: float, one_thread: None) -> None:
    tokenizer = tmm.load(f"tokenizers_mm/demo-{side}")
    card = (SHIPPED / f"demo-{side}" / "README.md").read_text(encoding="utf-8")
    said = re.search(r"PSNR of (\d+) crops \| ([\d.]+) dB", card)
    assert said is not None
    crops = torch.stack([image_to_tensor(crop) for crop in fixed_crops("heldout", int(said[1]), side)])
    measured = float(psnr(crops, reconstruct(tokenizer, crops)[0]).mean())
    assert measured == pytest.approx(float(said[2]), abs=0.02)
    assert measured >= least
    (picture,) = (SHIPPED / f"demo-{side}").glob("card.*")
    with Image.open(picture) as image:
        assert image.width > 500


def test_plain_areas_show_no_grid(one_thread: None) -> None:
    """Pattern repeated in plain areas, patch by patch: with the key `smooth` less than 0.3 of what it is without."""
    tokenizer: Any = tmm.load(NAME)
    config, patch = tokenizer.pixel_decoder.config, tokenizer.pixel_decoder.config.factor
    crops = torch.stack([image_to_tensor(crop) for crop in fixed_crops("heldout", 96, 64)])
    spread = F.max_pool2d(crops, 9, 1, 4) + F.max_pool2d(-crops, 9, 1, 4)
    crops = crops[(spread.amax(1) < 0.15).double().mean((1, 2)) > 0.9]
    assert len(crops) >= 8

    def grid(x: torch.Tensor) -> float:
        """Root mean square of the mean patch of each crop, less the means of one patch around each pixel."""
        mean = F.avg_pool2d(F.avg_pool2d(x, patch, 1), 2, 1)
        inner = (x[..., patch // 2 : -patch // 2, patch // 2 : -patch // 2] - mean).unflatten(-1, (-1, patch))
        return float(inner.unflatten(-3, (-1, patch)).mean((-4, -2)).square().mean().sqrt())

    codes = tokenizer.encode(crops)
    with torch.no_grad():
        smoothed = tokenizer.decode(codes)
        tokenizer.pixel_decoder.config = dataclasses.replace(config, smooth=0.0)
        plain = tokenizer.decode(codes)
    assert grid(smoothed) < 0.3 * grid(plain)
    torch.testing.assert_close(smoothed, smooth_plain(plain, patch, config.smooth))


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
