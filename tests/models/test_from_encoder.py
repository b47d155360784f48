"""Tokenizers of frozen encoders: codes that are found and not trained, and a decoder that learns."""

from typing import Any

import pytest
import torch
from torch import Tensor

from tokenizers_mm import kernels
from tokenizers_mm.decoders.pixel import PixelDecoderConfig
from tokenizers_mm.models import tokenizer_from
from tokenizers_mm.models.from_encoder import default_decoder

VIT: dict[str, Any] = {
    "name": "vit_tiny_patch16_224",
    "options": {"patch_size": 4, "embed_dim": 24, "depth": 1, "num_heads": 2},
}


def images(count: int = 8, side: int = 32) -> Tensor:
    return torch.rand(count, 3, side, side, generator=torch.Generator().manual_seed(1)) * 2 - 1


def test_codes_are_the_centres_of_the_features() -> None:
    torch.manual_seed(0)
    x = images()
    tokenizer = tokenizer_from(**VIT, images=x.split(3), codebook_size=16, iterations=4, seed=5)
    features = tokenizer.tower_features(x)
    found = kernels.kmeans(features.flatten(0, 2), 16, iterations=4, seed=5)
    assert torch.allclose(tokenizer.quantizer.look_up(torch.arange(16)), found.codebook, atol=1e-5)
    codes = tokenizer.encode(x)
    assert torch.equal(codes.ids.flatten(), kernels.nearest_code(features.flatten(0, 2), found.codebook))
    assert tokenizer.decode(codes).shape == x.shape
    assert tokenizer.image_size == (32, 32)
    assert not any(p.requires_grad for p in tokenizer.tower.parameters())
    assert tokenizer.config.tower.mean == (0.5, 0.5, 0.5)  # as timm states for this model


def test_per_dimension_codes_follow_the_features_more_closely() -> None:
    torch.manual_seed(0)
    x = images()
    errors = []
    for bits in (2, 4):
        tokenizer = tokenizer_from(**VIT, images=x, codebook_size=None, bits=bits)
        features = tokenizer.tower_features(x)
        codes = tokenizer.encode(x)
        assert codes.ids.shape == (8, 24 * 64)
        errors.append(float((tokenizer.vectors(codes) - features).square().mean() / features.var()))
    assert errors[1] < errors[0] / 4 < 0.1


def test_convolutional_encoders_have_their_own_cells() -> None:
    tokenizer = tokenizer_from("test_resnet", images(4, 64), codebook_size=8, options={"output_stride": 8})
    assert tokenizer.size_multiple == 8
    assert tokenizer.encode(images(1, 64)).ids.shape == (1, 64)


def test_the_decoder_alone_learns() -> None:
    torch.manual_seed(0)
    x = images(4) * 0.2
    small = PixelDecoderConfig(
        24, channels=16, multipliers=(1,), num_blocks=0, attention_levels=(), head_patch=4, num_groups=4
    )
    tokenizer = tokenizer_from(**VIT, images=x, codebook_size=64, decoder=small).train()
    before = {name: tensor.clone() for name, tensor in tokenizer.tower.state_dict().items()}
    parts = [tokenizer.embed, tokenizer.pixel_decoder]
    optimizer = torch.optim.Adam([p for part in parts if part is not None for p in part.parameters()], 2e-3)
    losses = []
    for _ in range(20):
        loss = (tokenizer(x).image - x).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.5 * losses[0]
    assert all(torch.equal(before[name], tensor) for name, tensor in tokenizer.tower.state_dict().items())


@pytest.mark.parametrize(("cell", "factor"), [(4, 4), (14, 14), (16, 16), (32, 32), (7, 7)])
def test_default_decoders_have_any_factor(cell: int, factor: int) -> None:
    assert default_decoder(cell, 24).factor == factor


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"name": "no_such_model"}, "name: expected the name of a timm model"),
        ({"images": []}, r"images: expected float \[B, 3, H, W\]"),
        ({"images": [images(1), images(1, 64)]}, "images: expected images of 32 x 32 pixels"),
        ({"codebook_size": 1000}, "num_codes: expected 1 to 512"),
    ],
)
def test_what_cannot_be_used_is_one_sentence(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tokenizer_from(**{**VIT, "images": images(), "codebook_size": 8, **changes})
