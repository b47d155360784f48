"""Semantic tokenizers: ids of a tower's features, with and without pixels."""

from pathlib import Path
from typing import Any

import pytest
import torch

import tokenizers_mm as tmm
from benchmarks.tiny import VQ
from benchmarks.tiny import semantic as tiny
from tokenizers_mm.config import to_mapping
from tokenizers_mm.types import Disturbance

ANY_SIZE = {"kind": "vit", "patch": 4, "positions": [4, 4], "width": 24, "depth": 1, "heads": 2, "norm": True}
PIXELS = {
    "in_channels": 8,
    "channels": 8,
    "multipliers": [1, 1, 2],
    "num_blocks": 0,
    "attention_levels": [],
    "num_groups": 4,
}
TRANSFORMER = {"kind": "transformer", "width": 16, "depth": 1, "heads": 2}
VARIANTS: dict[str, dict[str, Any]] = {
    "features": {"semantic_decoder": TRANSFORMER},
    "features, any size": {
        "tower": ANY_SIZE,
        "image_size": None,
        "semantic_decoder": {"kind": "conv", "depth": 1, "num_groups": 4},
    },
    "pixels": {"pixel_decoder": PIXELS},
    "both, a tower that learns": {
        "pixel_decoder": {**PIXELS, "context_channels": 6},
        "semantic_decoder": TRANSFORMER,
        "frozen": False,
    },
    "codes of the tower itself": {"pixel_decoder": PIXELS, "quantizer": {**VQ, "dim": 24}, "head": False},
    "groups": {"pixel_decoder": PIXELS, "quantizer": {"kind": "residual", "stage": VQ, "depth": 2}},
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_ids_give_back_what_one_pass_gives(variant: str, tmp_path: Path) -> None:
    tokenizer = tiny(**VARIANTS[variant])
    height, width = tokenizer.image_size or (16, 24)
    x = torch.rand(2, 3, height, width) * 2 - 1
    codes, output = tokenizer.encode(x), tokenizer(x)
    assert codes.ids.shape == (2, sum(stream.num_ids for stream in tokenizer.streams(height, width)))
    assert torch.allclose(output.vectors, tokenizer.vectors(codes), atol=1e-6)
    if tokenizer.semantic_decoder is not None:
        assert output.semantic is not None
        assert output.target is not None
        assert torch.equal(output.target, tokenizer.tower(x).flatten(1, 2))
        assert torch.allclose(output.semantic, tokenizer.features(codes), atol=1e-5)
    if tokenizer.pixel_decoder is None:
        assert output.image is None
        with pytest.raises(ValueError, match="codes: expected a tokenizer with a pixel decoder"):
            tokenizer.decode(codes)
    else:
        assert output.image is not None
        assert torch.allclose(output.image, tokenizer.decode(codes), atol=1e-5)
    if tokenizer.semantic_decoder is None:
        with pytest.raises(ValueError, match="vectors: expected a tokenizer with a semantic decoder"):
            tokenizer.decode_semantic(output.vectors)
    tokenizer.save(tmp_path)
    loaded = tmm.load(tmp_path)
    assert to_mapping(loaded.config) == to_mapping(tokenizer.config)
    assert torch.equal(loaded.encode(x).ids, codes.ids)


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_frozen_tower_stays_as_it_is(variant: str) -> None:
    tokenizer = tiny(**VARIANTS[variant]).train()
    height, width = tokenizer.image_size or (16, 24)
    output = tokenizer(torch.rand(2, 3, height, width) * 2 - 1)
    parts = [output.image, None if output.semantic is None else output.semantic - output.target]
    loss = torch.stack([part.square().mean() for part in parts if part is not None]).sum()
    terms = output.quantized["semantic"].terms
    assert terms is not None
    assert terms.keys() == tokenizer.quantizer.loss_terms
    (loss + sum(terms.values())).backward()
    silent = {name for name, p in tokenizer.named_parameters() if p.grad is None}
    frozen = {name for name, _ in tokenizer.named_parameters() if name.startswith("tower.")}
    assert silent == (frozen if tokenizer.config.frozen else set())
    assert tokenizer.tower.training is not tokenizer.config.frozen
    assert tokenizer.last_layer.grad is not None


def test_disturbance_reaches_the_pixels() -> None:
    tokenizer = tiny(**VARIANTS["pixels"])
    x = torch.rand(1, 3, 16, 16) * 2 - 1
    output = tokenizer.reconstruct(x, Disturbance(perturb=torch.zeros_like))
    assert output.image is not None
    assert torch.allclose(output.image, tokenizer.decode_pixels(torch.zeros_like(output.vectors)), atol=1e-6)
    with pytest.raises(ValueError, match=r"disturbance\.keep"):
        tokenizer.reconstruct(x, Disturbance(keep=(0,)))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({}, "semantic_decoder and pixel_decoder: expected one of them"),
        ({"pixel_decoder": {**PIXELS, "multipliers": [1, 2]}}, "pixel_decoder: expected a factor of 4"),
        ({"semantic_decoder": TRANSFORMER, "image_size": [18, 16]}, "image_size: expected multiples of 4"),
        ({"semantic_decoder": TRANSFORMER, "head": False}, "head: expected true, or 24 channels"),
        (
            {"semantic_decoder": TRANSFORMER, "tower": {**ANY_SIZE, "mean": [0.5, 0.5, 0.5]}},
            "mean and std: expected both",
        ),
    ],
)
def test_parts_that_do_not_go_together(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tiny(**changes)
