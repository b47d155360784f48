"""A saved tokenizer through transformers' own Auto classes: the same ids, images and features."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoImageProcessor, AutoModel

import tokenizers_mm.llm.automodel as automodel
from benchmarks.tiny import dualvitok_config as tiny_dualvitok_config
from benchmarks.tiny import tokenflow_config as tiny_config
from tests.mar_cases import tiny_config as tiny_mar_config
from tokenizers_mm.models import MAR, DualViTok, TokenFlow


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("auto")
    torch.manual_seed(0)
    TokenFlow.from_config(tiny_config()).save(folder / "tokenflow")
    DualViTok.from_config(tiny_dualvitok_config()).save(folder / "dualvitok")
    MAR.from_config(tiny_mar_config()).save(folder / "mar")
    return folder


def images(height: int, width: int) -> list[Image.Image]:
    rng = np.random.default_rng(0)
    return [Image.fromarray(rng.integers(256, size=(height, width, 3), dtype=np.uint8)) for _ in range(2)]


@pytest.mark.parametrize(("family", "size"), [("tokenflow", (32, 32)), ("dualvitok", (32, 64))])
def test_ids_and_images_are_those_of_the_library(saved: Path, family: str, size: tuple[int, int]) -> None:
    model = AutoModel.from_pretrained(saved / family)
    assert type(model) is automodel.VisualTokenizer
    assert not model.training
    processor = AutoImageProcessor.from_pretrained(saved / family)
    shown = images(*size)
    pixels = processor(shown, return_tensors="pt")["pixel_values"]
    torch.testing.assert_close(pixels, model.tokenizer.prepare(shown), rtol=0, atol=1e-6)
    codes = model.tokenizer.encode(shown)
    ids = model.get_image_tokens(pixels)
    assert torch.equal(ids, codes.ids)
    decoded = model.decode_image_tokens(ids, *size)
    torch.testing.assert_close(decoded, model.tokenizer.decode(codes).detach(), rtol=0, atol=0)
    torch.testing.assert_close(model.get_image_features(pixels), model.tokenizer.features(codes), rtol=1e-5, atol=1e-6)
    assert model(pixels) == codes
    if family == "tokenflow":
        torch.testing.assert_close(model.decode_image_tokens(ids), decoded, rtol=0, atol=0)


def test_the_processor_changes_sizes_as_fit_resize_does(saved: Path) -> None:
    """Within one of 255: two implementations of bicubic."""
    model = AutoModel.from_pretrained(saved / "tokenflow")
    processor = AutoImageProcessor.from_pretrained(saved / "tokenflow")
    shown = images(50, 41)
    pixels = processor(shown, return_tensors="pt")["pixel_values"]
    assert float((pixels - model.tokenizer.prepare(shown, "resize")).abs().max()) * 127.5 <= 1.01


def test_files_go_out_as_they_came(saved: Path, tmp_path: Path) -> None:
    model = AutoModel.from_pretrained(saved / "tokenflow", dtype=torch.bfloat16)
    assert model.tokenizer.dtype == torch.bfloat16
    model.save_pretrained(tmp_path)
    again = TokenFlow.from_pretrained(tmp_path)
    for name, tensor in model.tokenizer.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor), name


def test_what_has_no_meaning_is_refused(saved: Path) -> None:
    with pytest.raises(
        ValueError, match="options: expected revision, dtype and device_map, got \\['quantization_config'\\]"
    ):
        automodel.VisualTokenizer.from_pretrained(saved / "tokenflow", quantization_config={})
    model = automodel.VisualTokenizer.from_pretrained(saved / "mar")
    with pytest.raises(ValueError, match="model: expected a tokenizer with ids, got mar"):
        model.get_image_tokens(torch.zeros(1, 3, 32, 32))
    assert model.get_image_features(torch.zeros(1, 3, 32, 32)).ndim == 3
    with pytest.raises(ValueError, match="tokenizer: expected an image tokenizer"):
        automodel.VisualTokenizer(automodel.VisualTokenizerConfig())
