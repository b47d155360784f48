"""Measurements of training on held-out images: the same values as the metrics, and nothing hidden."""

import pytest
import torch
from torch import Tensor

from tests.models.test_tokenflow import tiny_config
from tokenizers_mm.eval.image import psnr, ssim
from tokenizers_mm.eval.validation import held_out, measure
from tokenizers_mm.models.tokenflow import TokenFlow


@pytest.fixture
def tokenizer() -> TokenFlow:
    torch.manual_seed(0)
    return TokenFlow.from_config(tiny_config()).train()


def test_values_are_those_of_the_metrics_and_nothing_changes(tokenizer: TokenFlow) -> None:
    images = held_out("", 5, (32, 32))
    before = {name: tensor.clone() for name, tensor in tokenizer.state_dict().items()}
    found = measure(tokenizer, images)
    assert tokenizer.training
    for name, tensor in tokenizer.state_dict().items():
        assert torch.equal(tensor, before[name]), name
    tokenizer.eval()
    codes = tokenizer.encode(images)
    decoded = tokenizer.decode(codes).detach().clamp(-1, 1)
    assert found["psnr"] == pytest.approx(float(psnr(images, decoded).mean()), rel=1e-6)
    assert found["ssim"] == pytest.approx(float(ssim(images, decoded).mean()), rel=1e-6)
    assert found["usage"] == len(codes.ids.unique()) / tokenizer.streams(32, 32)[0].codebook_size


def test_pixels_that_are_not_finite_are_an_error(tokenizer: TokenFlow, monkeypatch: pytest.MonkeyPatch) -> None:
    decode = tokenizer.decode

    def broken(codes: object) -> Tensor:
        images = decode(codes).clone()  # type: ignore[arg-type]
        images[0, 0, 0, 0] = torch.nan
        return images

    monkeypatch.setattr(tokenizer, "decode", broken)
    with pytest.raises(ValueError, match="reconstructions of held-out images: expected finite values, got NaN"):
        measure(tokenizer, held_out("", 2, (32, 32)))
