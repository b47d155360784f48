"""The VQGAN family: the contract of a tokenizer with any quantizer, at a small size."""

from pathlib import Path
from typing import Any

import pytest
import torch

import tokenizers_mm as tmm
from benchmarks.tiny import DECODER, ENCODER, VQ
from benchmarks.tiny import vqgan_config as tiny_config
from tests.quantizers.kinds import CONFIGS
from tokenizers_mm.config import to_mapping
from tokenizers_mm.models import VQGAN
from tokenizers_mm.types import Disturbance


def tiny(**changes: Any) -> VQGAN:
    torch.manual_seed(0)
    return VQGAN.from_config(tiny_config(**changes)).eval()


TRANSFORMER = {"grid": [4, 4], "width": 16, "depth": 1, "heads": 2}
TEACHER = {
    "name": "vit_tiny_patch16_224",
    "options": {"img_size": 16, "patch_size": 2, "embed_dim": 24, "depth": 1, "num_heads": 2},
}
VARIANTS: dict[str, dict[str, Any]] = {
    "single": {},
    "scales": {"scales": [[1, 1], [2, 2], [4, 4]], "kernel": 3},
    "vit": {
        "encoder": {"kind": "vit", "transformer": TRANSFORMER, "patch": 2},
        "decoder": {"kind": "vit", "transformer": TRANSFORMER, "patch": 2, "hidden": 8},
    },
    "magvit": {
        "encoder": {
            **ENCODER,
            "resampling": "shuffle",
            "bias": False,
            "middle_attention": False,
            "out_kernel": 1,
            "middle_blocks": 3,
        },
        "decoder": {
            **DECODER,
            "resampling": "shuffle",
            "bias": False,
            "middle_attention": False,
            "level_norms": True,
            "num_blocks": [0, 1],
        },
    },
    "groups": {"quantizer": {"kind": "residual", "stage": VQ, "depth": 2}},
    "teacher": {"teacher": TEACHER, "semantic_decoder": {"width": 16, "depth": 1, "heads": 2}},
    "codes condition norms": {"decoder": {**DECODER, "context_channels": 6}},
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_ids_give_back_the_image_of_one_pass(variant: str, tmp_path: Path) -> None:
    """Ids, vectors, image and features agree along all ways, before and after the tokenizer was saved."""
    tokenizer = tiny(**VARIANTS[variant])
    height, width = tokenizer.image_size or (8, 12)
    if variant == "teacher":
        height, width = 16, 16
    x = torch.rand(2, 3, height, width) * 2 - 1
    streams = tokenizer.streams(height, width)
    codes, output = tokenizer.encode(x), tokenizer(x)
    assert codes.ids.shape == (2, sum(stream.num_ids for stream in streams))
    assert len(streams) == tokenizer.quantizer.groups
    assert torch.allclose(output.vectors, tokenizer.vectors(codes), atol=1e-6)
    image = tokenizer.decode(codes)
    assert image.shape == x.shape
    assert torch.allclose(output.image, image, atol=1e-5)
    assert torch.equal(tokenizer.decode_ids(codes.ids, height, width), image)
    assert torch.equal(tokenizer.features(x), tokenizer.vectors(codes).flatten(1, 2))
    assert (output.semantic is not None) == ("target" in tokenizer.loss_terms)
    tokenizer.save(tmp_path)
    loaded = tmm.load(tmp_path)
    assert to_mapping(loaded.config) == to_mapping(tokenizer.config)
    assert torch.equal(loaded.encode(x).ids, codes.ids)
    assert torch.equal(loaded.decode(codes), image)


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_weight_learns_but_the_teachers(variant: str) -> None:
    tokenizer = tiny(**VARIANTS[variant]).train()
    height, width = tokenizer.image_size or ((16, 16) if variant == "teacher" else (8, 12))
    output = tokenizer(torch.rand(2, 3, height, width) * 2 - 1)
    loss = output.image.square().mean()
    terms = output.quantized["pixel"].terms
    assert terms is not None
    assert terms.keys() == tokenizer.quantizer.loss_terms
    loss = loss + sum(terms.values())
    if output.semantic is not None and output.target is not None:
        assert not output.target.requires_grad
        loss = loss + (output.semantic - output.target).square().mean()
    loss.backward()
    silent = {name for name, p in tokenizer.named_parameters() if p.grad is None}
    assert silent == {name for name, p in tokenizer.named_parameters() if name.startswith("teacher.")}
    assert tokenizer.last_layer.grad is not None


@pytest.mark.parametrize("kind", CONFIGS)
def test_takes_every_quantizer(kind: str) -> None:
    """One word of the configuration: ids, vectors and image agree, and all terms of the kind come out."""
    quantizer = to_mapping(CONFIGS[kind])
    tokenizer = tiny(quantizer=quantizer)
    assert tokenizer.config.quantizer == CONFIGS[kind]
    x = torch.rand(2, 3, 8, 12) * 2 - 1
    codes, output = tokenizer.encode(x), tokenizer(x)
    streams = tokenizer.streams(8, 12)
    assert codes.ids.shape == (2, 24 * tokenizer.quantizer.groups)
    assert {stream.num_ids for stream in streams} == {24}
    if kind != "ibq, unit":  # whose evaluation returns rows of norm 1, and whose table has others
        assert torch.allclose(output.vectors, tokenizer.vectors(codes), atol=1e-6)
    assert output.image is not None
    assert torch.allclose(tokenizer.decode_pixels(output.vectors), output.image, atol=1e-5)
    output = tokenizer.train()(x)
    assert output.quantized["pixel"].terms.keys() == tokenizer.quantizer.loss_terms
    output.image.square().mean().backward()
    assert tokenizer.encoder.get_parameter("conv_in.weight").grad is not None


def test_disturbances() -> None:
    x = torch.rand(1, 3, 8, 8) * 2 - 1
    single, scales = tiny(), tiny(**VARIANTS["scales"])
    zero = single.reconstruct(x, Disturbance(perturb=torch.zeros_like))
    assert zero.image is not None
    assert torch.allclose(zero.image, single.decode_pixels(torch.zeros_like(zero.vectors)), atol=1e-6)
    with pytest.raises(ValueError, match=r"disturbance\.keep"):
        single.reconstruct(x, Disturbance(keep=(0,)))
    assert scales.reconstruct(x, Disturbance(keep=(0, 1))).quantized["pixel"].ids.shape == (1, 5)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"kernel": 0}, "kernel: expected 1 or 3"),
        ({"decoder": {**DECODER, "multipliers": [1]}}, "decoder: expected the encoder's factor of 2"),
        ({"decoder": {**DECODER, "context_channels": 5}}, "decoder.context_channels: expected 6 or none"),
        ({"scales": [[4, 4], [2, 2]]}, "scales: expected grids no larger than the last one"),
        ({"teacher": TEACHER}, "teacher and semantic_decoder: expected both or neither"),
        ({"quantizer": {"kind": "what"}}, "quantizer.kind: expected one of"),
        ({"encoder": {**ENCODER, "kind": "mlp"}}, "encoder.kind: expected one of"),
        ({"encoder": {**ENCODER, "num_blocks": [1, 1, 1]}}, "num_blocks: expected one number, or 2"),
    ],
)
def test_parts_that_do_not_go_together(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tiny_config(**changes)
