"""Protocols as data: their hashes, what they do to images, and the conventions of papers on the reference case."""

import tarfile
from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from tests.cases import case
from tokenizers_mm._images import image_to_tensor
from tokenizers_mm.eval import PROTOCOLS
from tokenizers_mm.eval.base import Batch, Setup
from tokenizers_mm.eval.image import ssim
from tokenizers_mm.eval.images import ImageSource
from tokenizers_mm.eval.pixels import PSNR, SSIM
from tokenizers_mm.eval.protocols import Protocol, differences, protocol_by_name, round_to_bytes

OTHER = {
    "reference": "others",
    "fit": "pad",
    "size": 17,
    "other_size": "bicubic",
    "rounding": "none",
    "truth_of_sets": "truncated",
    "ssim": "uniform8",
    "ssim_range": 2.5,
}
"""A value of every field that no named protocol has, but for choices of two."""


def test_every_field_changes_the_hash() -> None:
    first = PROTOCOLS["default"]
    assert {field.name for field in fields(Protocol)} == {*OTHER, "name"}
    hashes = {replace(first, **{name: value}).hash for name, value in OTHER.items()}
    assert len(hashes | {first.hash}) == len(OTHER) + 1
    assert replace(first, name="other").hash == first.hash
    assert len({protocol.hash for protocol in PROTOCOLS.values()}) == len(PROTOCOLS)


def test_names_tell_what_was_changed() -> None:
    changed = protocol_by_name("imagenet-val-256", size=128)
    assert changed.name == "imagenet-val-256 size=128"
    assert changed.hash != PROTOCOLS["imagenet-val-256"].hash
    assert protocol_by_name("imagenet-val-256", size=256) is PROTOCOLS["imagenet-val-256"]
    assert differences(changed, PROTOCOLS["imagenet-val-256"]) == ["size: 128 / 256"]
    with pytest.raises(ValueError, match="protocol: expected one of default, imagenet-val-256"):
        protocol_by_name("imagenet")


def test_sizes_and_seeds_are_judged_before_the_work() -> None:
    for size in (-1, -64, 1 << 30, 10**40):
        with pytest.raises(ValueError, match="size: expected 0 to 16384 pixels, got"):
            protocol_by_name("default", size=size)
    for seed in (-1, 1 << 63, 10**40):
        with pytest.raises(ValueError, match="seed: expected a number from 0 to"):
            Setup(protocol_by_name("default"), seed=seed)


def test_preparation_and_finish() -> None:
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (90, 150, 3), dtype=np.uint8))
    assert PROTOCOLS["imagenet-val-256"].prepare(image, (64, 64), 8).size == (64, 64)
    assert PROTOCOLS["native"].prepare(image, None, 16).size == (144, 80)
    with pytest.raises(ValueError, match="protocol: expected a size for the crop of ADM"):
        PROTOCOLS["paper:tokenflow"].prepare(image, None, 16)
    x = torch.tensor([-3.0, -1.0, 0.001, 1.0, 2.0]).expand(1, 3, 2, 5)
    finished = PROTOCOLS["default"].finish(x)
    assert torch.equal(finished, round_to_bytes(finished)), "a byte stays what it is"
    assert float(finished.min()) == -1.0
    assert float(finished.max()) == 1.0
    assert float(replace(PROTOCOLS["default"], rounding="none").finish(x)[0, 0, 0, 2]) == pytest.approx(0.001)
    with pytest.raises(ValueError, match="reconstruction: expected finite values, got NaN or infinity"):
        PROTOCOLS["default"].finish(x + torch.nan)


def test_tokenflow_convention_reproduces_the_released_values() -> None:
    """PSNR, and SSIM with a uniform window and range 2, as the original's script gives them; ours by default."""
    reference = case("tokenflow/preprocess_metrics")
    truth, decoded, outputs = reference.inputs["metric.gt"], reference.inputs["metric.rec"], reference.outputs
    values = {}
    for name in ("paper:tokenflow", "default"):
        protocol = PROTOCOLS[name]
        batch = Batch(truth, protocol.finish(decoded))
        bytes_of = (batch.reconstructions + 1).mul(127.5).round().to(torch.uint8).permute(0, 2, 3, 1)
        assert torch.equal(bytes_of, outputs["metric.png"])
        for metric in (PSNR(Setup(protocol)), SSIM(Setup(protocol))):
            metric.update(batch)
            values[name, metric.name] = torch.tensor(metric.values)
    released = {"psnr": "metric.psnr", "ssim": "metric.ssim_data_range_2_as_released"}
    for metric, key in released.items():
        theirs = outputs[key].double()
        torch.testing.assert_close(values["paper:tokenflow", metric].double(), theirs, rtol=0, atol=1e-5)
    assert bool((values["default", "ssim"] < values["paper:tokenflow", "ssim"]).all())
    uniform = ssim(truth, PROTOCOLS["default"].finish(decoded), "uniform7").float()
    torch.testing.assert_close(uniform, outputs["metric.ssim_data_range_1"].float(), rtol=0, atol=1e-5)


def test_tokenflow_truth_of_sets_is_cut() -> None:
    """The original writes its ground truth with a cast that cuts: the same share of values comes out one lower."""
    reference = case("tokenflow/preprocess_metrics")
    crop = Image.fromarray(reference.outputs["a.center_crop_224"].numpy())
    x = image_to_tensor(crop)[None]
    cut = PROTOCOLS["paper:tokenflow"].reference_of_sets(x)
    lower = int(((x - cut) * 127.5).round().sum())
    assert lower == pytest.approx(int(reference.outputs["a.gt_png_minus_crop"].abs()), rel=0.02)
    assert torch.equal(PROTOCOLS["default"].reference_of_sets(x), x)


def test_images_of_tar_files(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for index in range(3):
            image = Image.new("RGB", (8 + index, 8), (index, 0, 0))
            image.save(tmp_path / f"{index}.png")
            tar.add(tmp_path / f"{index}.png", f"x/{index}.png")
    found = ImageSource.at(str(tmp_path), limit=2)
    assert found.names == ["a/x/0.png", "a/x/1.png"]
    assert [found.read(index).image.size for index in range(2)] == [(8, 8), (9, 8)]
