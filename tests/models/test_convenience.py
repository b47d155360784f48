"""Short forms of every tokenizer's methods."""

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import tokenizers_mm as tmm
from benchmarks.tiny import dualvitok_config as tiny_dualvitok_config
from benchmarks.tiny import tokenflow_config as tiny_config
from tests.mar_cases import tiny_config as tiny_mar_config
from tokenizers_mm.models import MAR, MODELS, DualViTok, ImageTokenizer, TokenFlow


@pytest.fixture(scope="module")
def tokenizers() -> dict[str, ImageTokenizer]:
    torch.manual_seed(0)
    return {
        "tokenflow": TokenFlow.from_config(tiny_config()).eval(),
        "dualvitok": DualViTok.from_config(tiny_dualvitok_config()).eval(),
        "mar": MAR.from_config(tiny_mar_config()).eval(),
    }


NAMES = ("tokenflow", "dualvitok", "mar")


def noise(side: int = 32, seed: int = 0) -> Image.Image:
    values = np.random.default_rng(seed).integers(256, size=(side, side, 3), dtype=np.uint8)
    return Image.fromarray(values)


@pytest.mark.parametrize("name", NAMES)
def test_reconstruct_takes_images_of_every_kind(
    tokenizers: dict[str, ImageTokenizer], name: str, tmp_path: Path
) -> None:
    tok = tokenizers[name]
    noise().save(tmp_path / "a.png")
    x = tok.prepare(noise())
    expected: Any = tok.reconstruct(x)
    assert expected.image.requires_grad
    for images in (noise(), tmp_path / "a.png", str(tmp_path / "a.png"), [noise()]):
        found: Any = tok.reconstruct(images)
        torch.testing.assert_close(found.image, expected.image, rtol=0, atol=0)
        assert not found.image.requires_grad
    odd: Any = tok.reconstruct(noise(37), fit="crop")
    assert odd.image.shape == x.shape
    with pytest.raises(ValueError, match="expected"):
        tok.reconstruct(noise(37))


def test_every_family_takes_images_of_every_kind() -> None:
    for name, family in MODELS.items():
        assert hasattr(family.reconstruct, "__wrapped__"), f"{name}: decorate reconstruct with from_images"


def test_gradients_reach_the_image_and_the_weights_through_a_tensor(tokenizers: dict[str, ImageTokenizer]) -> None:
    tok = tokenizers["tokenflow"]
    x = tok.prepare(noise()).requires_grad_()
    output: Any = tok.reconstruct(x)
    output.image.square().mean().backward()
    assert x.grad is not None
    assert float(x.grad.abs().sum()) > 0
    assert float(tok.last_layer.grad.abs().sum()) > 0  # type: ignore[union-attr]
    tok.zero_grad()


@pytest.mark.parametrize("name", NAMES)
def test_counts_are_those_of_the_streams(tokenizers: dict[str, ImageTokenizer], name: str) -> None:
    tok = tokenizers[name]
    streams = tok.streams(32, 32)
    assert tok.num_ids(32, 32) == sum(stream.num_ids for stream in streams)
    assert tok.codebook_size == sum(stream.codebook_size for stream in streams)
    if streams:
        assert tok.encode(noise()).ids.shape == (1, tok.num_ids(32, 32))
    if tok.image_size is None:
        with pytest.raises(ValueError, match="height and width: expected the size of the image"):
            tok.num_ids()
    else:
        assert tok.num_ids() == tok.num_ids(*tok.image_size)


@pytest.mark.parametrize("name", NAMES)
def test_one_line_and_a_table(tokenizers: dict[str, ImageTokenizer], name: str) -> None:
    tok = tokenizers[name]
    line = repr(tok)
    assert "\n" not in line
    assert len(line) < 200
    assert re.fullmatch(rf"{type(tok).__name__}\(.* M parameters, cpu float32\)", line)
    page = tok._repr_html_()
    assert all(f"<th>{part}</th>" in page for part, _ in tok.named_children())
    assert len(torch.nn.Module.__repr__(tok).splitlines()) > 20


@pytest.mark.parametrize("name", NAMES)
def test_show_and_to_pil(tokenizers: dict[str, ImageTokenizer], name: str) -> None:
    tok = tokenizers[name]
    sheet = tok.show([noise(40, seed) for seed in range(3)], zoom=2)
    x = tok.prepare(noise(40), "crop")
    side = x.shape[-1]
    assert sheet.width == 3 * (2 * side + 4) + 4
    codes = tok.encode([noise(), noise(seed=1)])
    with torch.no_grad():
        expected = tok.to_pil(tok.decode(codes))
    assert [image.tobytes() for image in tok.to_pil(codes)] == [image.tobytes() for image in expected]
    top = sheet.crop((4, 4, 4 + 2 * side, 4 + 2 * side)).resize((side, side), Image.Resampling.NEAREST)
    assert top.tobytes() == tok.to_pil(x)[0].tobytes()


def test_plain_ids_decode_without_gradients(tokenizers: dict[str, ImageTokenizer]) -> None:
    tok = tokenizers["tokenflow"]
    codes = tok.encode(noise())
    assert not tok.decode_ids(codes.numpy()).requires_grad
    assert tok.decode(codes).requires_grad
    torch.testing.assert_close(tok.decode_ids(codes.ids), tok.decode(codes).detach(), rtol=0, atol=0)


def test_hugging_face_names(tokenizers: dict[str, ImageTokenizer], tmp_path: Path) -> None:
    tok = tokenizers["tokenflow"]
    tok.save_pretrained(tmp_path / "tok")
    for loaded in (
        TokenFlow.from_pretrained(tmp_path / "tok"),
        tmm.from_pretrained(tmp_path / "tok"),
        tmm.ImageTokenizer.from_pretrained(tmp_path / "tok", device="cpu"),
    ):
        assert type(loaded) is TokenFlow
        assert loaded.encode(noise()) == tok.encode(noise())
    with pytest.raises(ValueError, match="source: expected a tokenizer of family 'mar', got 'tokenflow'"):
        MAR.from_pretrained(tmp_path / "tok")
    with pytest.raises(ValueError, match="none without push_to_hub"):
        tok.save_pretrained(tmp_path / "tok", private=True)
