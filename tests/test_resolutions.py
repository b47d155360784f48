"""Sizes, grids and counts against the original's tables, and pictures brought to them."""

import json
import math

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from tests.cases import case
from tokenizers_mm._images import contain_and_pad, cover_and_cut, fit_multiple, image_to_tensor, undo_contain_and_pad
from tokenizers_mm.encoders.qwen2_vit import Qwen2ViT, Qwen2ViTConfig
from tokenizers_mm.layers.position import block_order
from tokenizers_mm.resolutions import ANCHORS, Resolutions

FALLBACK = [(384, 640), (256, 384), (256, 512), (272, 304), (144, 80), (768, 768)]


def tables() -> dict:
    return json.loads((case("dualvitok/preprocess").folder / "tables.json").read_text())


def picture(array: Tensor) -> Image.Image:
    return Image.fromarray(array.numpy())


def test_tower_sizes_and_grids() -> None:
    rules = Resolutions()
    table = tables()["resolution"]
    for name, expected in table.items():
        height, width = map(int, name.split("x"))
        assert rules.tower_size(height, width) == tuple(expected["vit_hw"])
        assert rules.semantic_grid(height, width) == tuple(expected["sem_grid"])
        assert rules.pixel_grid(height, width) == tuple(expected["pix_grid"])
    assert {f"{h}x{w}" for h, w in ANCHORS} <= table.keys()
    assert rules.counts(256, 256) == (81, 256)
    assert rules.counts(512, 384) == (192, 768)


def test_smart_sizes() -> None:
    rules = Resolutions()
    cases = tables()["smart_resize_factor16"]
    assert len(cases) == 120
    for c in cases:
        assert rules.smart_size(c["h"], c["w"], c["min_pixels"], c["max_pixels"]) == tuple(c["out"]), c
    for height, width in [(40, 40), (3000, 2000), (5, 9)]:
        assert rules.smart_size(height, width) == rules.smart_size(height, width, 32**2, 1024**2)


def test_anchors() -> None:
    everywhere, square = Resolutions(), Resolutions(anchors=((256, 256),))
    for c in tables()["aspect_ratio_crop"]:
        found = (everywhere if c["n_base"] == 11 else square).cover(c["h"], c["w"])
        assert (found.anchor, found.covering) == (tuple(c["pred_hw"]), tuple(c["resized_hw"])), c
        assert found.cropped == pytest.approx(c["crop_percent"], abs=1e-12)
        assert (found.cropped <= 0.2) == c["kept"]
    ratios = tables()["assign_ratio"]
    rules = Resolutions(anchors=tuple((h, w) for h, w in ratios["base_sizes"]))
    assert [rules.nearest_anchor(c["h"], c["w"]) for c in ratios["cases"]] == [c["index"] for c in ratios["cases"]]


@pytest.mark.parametrize("size", [*ANCHORS, *FALLBACK])
def test_counts_follow_from_grids(size: tuple[int, int]) -> None:
    rules = Resolutions()
    assert rules.counts(*size) == (math.prod(rules.semantic_grid(*size)), math.prod(rules.pixel_grid(*size)))
    assert rules.tower_size(*size) == rules.tower_size(*size[::-1])[::-1]


def test_bad_rules_and_sizes_get_one_sentence() -> None:
    for make, message in [
        (lambda: Resolutions().pixel_grid(100, 64), "multiples of 16, got 100 x 64"),
        (lambda: Resolutions().smart_size(0, 64), "positive sides, got 0 x 64"),
        (
            lambda: Resolutions(tower_sizes=(((64, 64), (30, 28)),)),
            r"tower_sizes of \(64, 64\): expected multiples of 28",
        ),
        (lambda: Resolutions(min_pixels=10, max_pixels=5), "min_pixels: expected 1 to 5, got 10"),
    ]:
        with pytest.raises(ValueError, match=message):
            make()


@pytest.mark.parametrize("index", [0, 1, 2])
def test_pictures_at_an_anchor(index: int) -> None:
    reference = case("dualvitok/preprocess", whole=True)
    t = reference.tensors("preprocess")
    if f"crop{index}.uint8_hwc" not in t:
        pytest.skip("this picture is larger than what the checkout carries")
    source = picture(t[f"crop{index}.uint8_hwc"])
    target = {0: (48, 48), 1: (32, 64), 2: (48, 96)}[index]
    padded = contain_and_pad(source, *target)
    back = undo_contain_and_pad(padded, source.height, source.width)
    for made, name in [
        (cover_and_cut(source, *target), "center_crop_and_resize"),
        (padded, "resize_with_padding"),
        (back, "unpad_and_resize_back"),
    ]:
        assert np.array_equal(np.asarray(made), t[f"crop{index}.{name}"].numpy()), name


@pytest.mark.parametrize("index", range(6))
def test_processor_values(index: int) -> None:
    """Smart resize (bicubic on bytes), then [-1, 1]; 1.2e-7 is one step of float32."""
    reference = case("dualvitok/preprocess", whole=True)
    t, meta = reference.tensors("preprocess"), json.loads((reference.folder / "meta.json").read_text())
    if f"{index}.pixel_values" not in t:
        pytest.skip("this picture is larger than what the checkout carries")
    source = picture(t[f"{index}.uint8_hwc"])
    c = next(item for item in meta if item.get("i") == index)
    rows, columns = Resolutions().smart_size(source.height, source.width, c["min_pixels"], c["max_pixels"])
    made = image_to_tensor(source.resize((columns, rows), Image.Resampling.BICUBIC))
    torch.testing.assert_close(made[None], t[f"{index}.pixel_values"], atol=2.4e-7, rtol=0)


@pytest.mark.parametrize("index", [0, 1, 2])
def test_what_the_tower_sees(index: int) -> None:
    t = case("dualvitok/preprocess", whole=True).tensors("preprocess")
    if f"scaling{index}.image" not in t:
        pytest.skip("this picture is larger than what the checkout carries")
    x = t[f"scaling{index}.image"]
    size = Resolutions().tower_size(*x.shape[-2:])
    assert t[f"scaling{index}.grid_thw"].tolist() == [[1, size[0] // 14, size[1] // 14]] * len(x)
    seen = Qwen2ViT(Qwen2ViTConfig(width=16, depth=0, heads=4, out_dim=8)).prepare(x, size)
    patches = seen.unfold(2, 14, 14).unfold(3, 14, 14).permute(0, 2, 3, 1, 4, 5)  # [B, rows, columns, 3, 14, 14]
    twice = patches.unsqueeze(4).expand(-1, -1, -1, -1, 2, -1, -1).flatten(3)
    torch.testing.assert_close(block_order(twice, 2).flatten(0, 1), t[f"scaling{index}.patches"], atol=2e-6, rtol=0)


def test_fitting_to_multiples() -> None:
    source = Image.fromarray(np.arange(37 * 50 * 3, dtype=np.uint32).astype(np.uint8).reshape(37, 50, 3))
    cut, padded = fit_multiple(source, 16, "crop"), fit_multiple(source, 16, "pad")
    assert np.array_equal(np.asarray(cut), np.asarray(source)[2:34, 1:49])
    assert padded.size == (64, 48)
    assert np.array_equal(np.asarray(padded)[5:42, 7:57], np.asarray(source))
    assert fit_multiple(source, 16, "resize").size == (48, 32)
    assert fit_multiple(cut, 16, "pad") is cut
    with pytest.raises(ValueError, match="at least 64 pixels on each side, got 37 x 50"):
        fit_multiple(source, 64, "crop")
