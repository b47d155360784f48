"""Types of what tokenizers return, as a type checker infers them: `make lint` runs pyright over this file."""

from pathlib import Path
from typing import Any

import torch
from PIL import Image
from typing_extensions import assert_type

import tokenizers_mm as tmm
from benchmarks.tiny import tokenflow_config as tiny_config
from tokenizers_mm.models import MAR, TokenFlow
from tokenizers_mm.types import ImageCodes, ImageLatents, Reconstruction


def test_encode_gives_the_codes_of_the_family(tmp_path: Path) -> None:
    torch.manual_seed(0)
    TokenFlow.from_config(tiny_config()).save(tmp_path / "tok")
    tokenizer = assert_type(TokenFlow.from_pretrained(tmp_path / "tok"), TokenFlow)
    image = Image.new("RGB", (32, 32))
    image.save(tmp_path / "image.png")
    codes = assert_type(tokenizer.encode(torch.zeros(2, 3, 32, 32)), ImageCodes)
    for one in (image, tmp_path / "image.png", str(tmp_path / "image.png")):
        found = assert_type(tokenizer.encode(one, fit="crop", stable=True), ImageCodes)
        assert found.ids.shape == codes[0].ids.shape
    assert isinstance(assert_type(tokenizer.encode([image, image]), ImageCodes | Any), ImageCodes)
    assert len(assert_type(tokenizer.encode_each([image, image]), list[ImageCodes])) == 2
    assert_type(tokenizer.decode(codes), torch.Tensor)
    assert_type(tokenizer.reconstruct(image), Reconstruction)
    assert_type(codes[0], ImageCodes)


def test_a_loaded_tokenizer_may_be_of_any_family(tmp_path: Path) -> None:
    """`load` reads the family from a file, so that a checker cannot know it: nothing has to be cast."""
    torch.manual_seed(0)
    TokenFlow.from_config(tiny_config()).save(tmp_path / "tok")
    codes = assert_type(tmm.load(tmp_path / "tok").encode(torch.zeros(1, 3, 32, 32)), Any)
    assert isinstance(codes, ImageCodes)


def continuous(tokenizer: MAR, image: Image.Image) -> ImageLatents:
    """Read by the checker alone."""
    return assert_type(tokenizer.encode(image), ImageLatents)
