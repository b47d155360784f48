"""The composed DualViTok model at a tiny size: one road, sizes, mixed batches, dtypes, saving, errors."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

import tokenizers_mm as tmm
from benchmarks.tiny import dualvitok_config as tiny_config
from tokenizers_mm.layers.rotary import RotaryTransformerConfig
from tokenizers_mm.models import DualViTok
from tokenizers_mm.quantizers.vq import SimVQ
from tokenizers_mm.resolutions import ANCHORS
from tokenizers_mm.types import Disturbance, ImageCodes

FALLBACK = [(384, 640), (256, 384), (256, 512), (272, 304), (144, 80), (640, 384)]


@pytest.fixture(scope="module")
def tokenizer() -> DualViTok:
    torch.manual_seed(0)
    return DualViTok.from_config(tiny_config()).eval()


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def picture(height: int, width: int, seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


@pytest.mark.parametrize("size", [*ANCHORS, *FALLBACK])
@torch.no_grad()
def test_sizes_agree_in_streams_ids_and_images(tokenizer: DualViTok, size: tuple[int, int]) -> None:
    codes = tokenizer.encode(noise(1, 3, *size))
    rules = tokenizer.resolutions
    assert [stream.grids for stream in codes.streams] == [(rules.semantic_grid(*size),), (rules.pixel_grid(*size),)]
    assert tuple(stream.num_ids for stream in codes.streams) == rules.counts(*size)
    assert codes.ids.shape == (1, sum(rules.counts(*size)))
    assert tokenizer.decode(codes).shape == (1, 3, *size)


@torch.no_grad()
def test_forward_is_decode_of_encode(tokenizer: DualViTok) -> None:
    x = noise(2, 3, 64, 96)
    codes, output = tokenizer.encode(x), tokenizer(x)
    for stream in ("semantic", "pixel"):
        assert torch.equal(codes.stream(stream), output.quantized[stream].ids.flatten(1))
    torch.testing.assert_close(tokenizer.decode(codes), output.image, atol=2e-5, rtol=0)
    torch.testing.assert_close(tokenizer.decode_ids(codes.ids, 64, 96), output.image, atol=2e-5, rtol=0)
    assert output.semantic.shape == output.target.shape == (2, 6, 24)
    torch.testing.assert_close(tokenizer.features(x), tokenizer.features(codes))
    assert tokenizer.features(codes).shape == (2, 24, 16)
    assert {name: tuple(f.shape) for name, f in tokenizer.stream_features(x).items()} == {
        "semantic": (2, 2, 3, 24),
        "pixel": (2, 4, 6, 8),
    }


def test_disturbed_pixel_codes_reach_the_image_only(tokenizer: DualViTok) -> None:
    x = noise(1, 3, 64, 64)
    with torch.no_grad():
        plain, disturbed = tokenizer(x), tokenizer.reconstruct(x, Disturbance(perturb=torch.zeros_like))
    assert plain.image is not None
    assert disturbed.image is not None
    assert not torch.allclose(plain.image, disturbed.image)
    assert plain.semantic is not None
    assert disturbed.semantic is not None
    assert torch.equal(plain.semantic, disturbed.semantic)
    assert torch.equal(plain.quantized["pixel"].vectors, disturbed.quantized["pixel"].vectors)


def test_what_learns_and_what_does_not() -> None:
    model = DualViTok.from_config(tiny_config()).train()
    output = model(noise(2, 3, 64, 64))
    assert output.target is not None
    assert not output.target.requires_grad
    terms = [t for q in output.quantized.values() if (t := q.terms) is not None]
    loss = output.image.square().mean() + output.semantic.square().mean()
    (loss + sum(t["codebook"] + t["commitment"] for t in terms)).backward()
    without = {name for name, p in model.named_parameters() if p.grad is None}
    assert without == {name for name, _ in model.named_parameters() if name.startswith("semantic_encoder.tower.")}


def test_mixed_sizes_come_back_in_order(tokenizer: DualViTok, tmp_path: Path) -> None:
    sizes = [(64, 96), (96, 64), (64, 96), (64, 64), (96, 64)]
    pictures = [picture(*size, seed=i) for i, size in enumerate(sizes)]
    paths = []
    for index, item in enumerate(pictures):
        paths.append(tmp_path / f"{index}.png")
        item.save(paths[-1])
    mixed = tokenizer.encode(pictures)
    assert isinstance(mixed, list)
    for codes, size, item, from_file in zip(mixed, sizes, pictures, tokenizer.encode_each(paths), strict=True):
        assert (codes.height, codes.width) == size
        assert torch.equal(codes.ids, tokenizer.encode(item).ids)
        assert torch.equal(codes.ids, from_file.ids)
    assert isinstance(tokenizer.encode(pictures[:1]), ImageCodes)
    with pytest.raises(ValueError, match="images of one size"):
        tokenizer.features(pictures)


def test_the_caller_chooses_what_becomes_of_other_sizes(tokenizer: DualViTok) -> None:
    odd = picture(70, 100)
    with pytest.raises(ValueError, match="height and width that are multiples of 16, got 70 x 100"):
        tokenizer.encode(odd)
    for fit, size in [("crop", (64, 96)), ("pad", (80, 112)), ("resize", (64, 96))]:
        codes = tokenizer.encode(odd, fit=fit)  # type: ignore[call-overload]
        assert (codes.height, codes.width) == size
    bounded = dataclasses.replace(tokenizer.resolutions, max_pixels=64 * 64)
    small = DualViTok.from_config(dataclasses.replace(tiny_config(), resolutions=bounded)).eval()
    codes = small.encode(picture(128, 128), fit="resize")
    assert (codes.height, codes.width) == (64, 64)
    with pytest.raises(ValueError, match="at least 16 pixels on each side"):
        tokenizer.encode(picture(8, 40), fit="crop")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("autocast", [False, True])
@torch.no_grad()
def test_half_precision_encodes(dtype: torch.dtype, autocast: bool, record_property) -> None:
    """The original crashes here. Ids are searched in float32; features are as good as the dtype allows."""
    torch.manual_seed(0)
    model = DualViTok.from_config(tiny_config()).eval()
    x = noise(4, 3, 128, 128)
    exact = model.encode(x).ids
    wanted = model.encode_features(x)[:2]
    if autocast:
        with torch.autocast("cpu", dtype):
            ids, features, image = model.encode(x).ids, model.encode_features(x)[:2], model(x).image
    else:
        model.to(dtype)
        ids, features = model.encode(x).ids, model.encode_features(x.to(dtype))[:2]
        image = model.decode_ids(ids, 128, 128)
    flips = float((ids != exact).float().mean())
    record_property("flip rate", flips)
    print(f"flip rate of {dtype} ({'autocast' if autocast else 'weights'}): {flips:.4f}")
    for got, want in zip(features, wanted, strict=True):
        error = float((got.float() - want).square().mean().sqrt() / want.std())
        assert error < (0.05 if dtype == torch.bfloat16 else 0.01)  # a few steps of 2^-8 and 2^-11
    assert bool(torch.isfinite(image).all())
    assert flips < 0.2


def test_searches_in_float32_whatever_the_features_are(tokenizer: DualViTok) -> None:
    z = noise(50, 8).to(torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        ids = tokenizer.pixel_quantizer.quantize(z).ids
    assert isinstance(tokenizer.pixel_quantizer, SimVQ)
    distances = (z.double()[:, None] - tokenizer.pixel_quantizer.codebook().double()).square().sum(-1)
    assert torch.equal(ids, distances.argmin(1))


def test_save_and_load_give_the_same_model(tokenizer: DualViTok, tmp_path: Path) -> None:
    x = noise(1, 3, 64, 80)
    tokenizer.save(tmp_path / "tok")
    again = tmm.load(tmp_path / "tok")
    assert again.config == tokenizer.config
    assert torch.equal(again.encode(x).ids, tokenizer.encode(x).ids)
    assert not any(p.requires_grad for n, p in again.named_parameters() if n.startswith("semantic_encoder.tower."))


def test_bad_configurations_get_one_sentence() -> None:
    config = tiny_config()
    cells = dataclasses.replace(config, resolutions=dataclasses.replace(config.resolutions, pixel_cell=8))
    decoder = dataclasses.replace(config, pixel_decoder=dataclasses.replace(config.pixel_decoder, context_channels=8))
    narrow = dataclasses.replace(config, semantic_decoder=RotaryTransformerConfig(36, 1, 2))
    for bad, message in [
        (cells, r"resolutions: expected cells of 16 and 28 pixels, got \(8, 28\)"),
        (decoder, "pixel_decoder.context_channels: expected 16, as in both codebooks, got 8"),
        (narrow, r"width: expected a multiple of 8 \(4 \* heads\), got 36"),
    ]:
        with pytest.raises(ValueError, match=message):
            DualViTok.from_config(bad)


def test_bad_ids_get_one_sentence(tokenizer: DualViTok) -> None:
    good = tokenizer.encode(noise(1, 3, 64, 64)).ids
    for ids, message in [
        (good[:, :-1], r"ids: expected int64 \[B, 20\], got int64 \[1, 19\]"),
        (torch.full_like(good, 64), "ids of stream 'semantic': expected values from 0 to 63, got values from 64 to 64"),
    ]:
        with pytest.raises(ValueError, match=message):
            tokenizer.decode_ids(ids, 64, 64)
    with pytest.raises(ValueError, match="height and width"):
        tokenizer.decode_ids(good)
