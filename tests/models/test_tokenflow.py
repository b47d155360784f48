"""The composed TokenFlow model at a tiny size: one road, round trips, saving, errors."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

import tokenizers_mm as tmm
from benchmarks.tiny import tokenflow_config as tiny_config
from tokenizers_mm.models import TokenFlow


@pytest.fixture(scope="module")
def tokenizer() -> TokenFlow:
    torch.manual_seed(0)
    return TokenFlow.from_config(tiny_config()).eval()


@pytest.fixture(scope="module")
def images() -> torch.Tensor:
    return torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(1)) * 2 - 1


def test_forward_is_decode_of_encode(tokenizer: TokenFlow, images: torch.Tensor) -> None:
    codes = tokenizer.encode(images)
    assert codes.ids.shape == (2, 21)
    output = tokenizer(images)
    assert torch.equal(output.quantized["shared"].ids, codes.ids)
    torch.testing.assert_close(tokenizer.decode(codes), output.image, atol=2e-5, rtol=0)
    torch.testing.assert_close(tokenizer.decode_ids(codes.ids), output.image, atol=2e-5, rtol=0)
    assert output.semantic.shape == (2, 16, 24)
    assert tokenizer.features(codes).shape == (2, 16, 12)
    torch.testing.assert_close(tokenizer.features(images), tokenizer.features(codes))


def test_save_and_load_give_the_same_model(tokenizer: TokenFlow, images: torch.Tensor, tmp_path: Path) -> None:
    tokenizer.save(tmp_path / "tok")
    assert sorted(p.name for p in (tmp_path / "tok").iterdir()) == [
        "README.md",
        "config.json",
        "model.safetensors",
        "preprocessor_config.json",
    ]
    again = tmm.load(tmp_path / "tok")
    assert again.config == tokenizer.config
    assert torch.equal(again.encode(images).ids, tokenizer.encode(images).ids)
    assert torch.equal(again.decode(again.encode(images)), tokenizer.decode(tokenizer.encode(images)))
    again.save(tmp_path / "tok")  # over an existing directory
    assert not [p for p in tmp_path.iterdir() if p.name.startswith(".")]


def test_evaluation_leaves_the_state_unchanged(tokenizer: TokenFlow, images: torch.Tensor) -> None:
    before = {name: tensor.clone() for name, tensor in tokenizer.state_dict().items()}
    tokenizer(images)
    after = tokenizer.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_pictures_and_paths(tokenizer: TokenFlow, images: torch.Tensor, tmp_path: Path) -> None:
    picture = tokenizer.to_pil(images)[0]
    picture.save(tmp_path / "a.png")
    from_path = tokenizer.encode(tmp_path / "a.png")
    assert torch.equal(from_path.ids, tokenizer.encode([picture]).ids)
    wide = Image.new("L", (80, 40), 100)
    with pytest.raises(ValueError, match="expected 32 x 32 pixels, got 40 x 80"):
        tokenizer.encode(wide)
    for fit in ("crop", "pad", "resize"):
        assert tokenizer.encode(wide, fit=fit).ids.shape == (1, 21)


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (torch.zeros(1, 3, 40, 32), "expected 32 x 32 pixels, got 40 x 32"),
        (torch.zeros(1, 3, 32, 32, dtype=torch.uint8), r"expected float \[B, 3, H, W\] in \[-1, 1\], got uint8"),
        (torch.full((1, 3, 32, 32), torch.nan), "finite values in"),
        (torch.full((1, 3, 32, 32), 255.0), "finite values in"),
        (torch.zeros(3, 32, 32), r"got float32 \[3, 32, 32\]"),
        (42, "PIL images or paths, got int"),
        ([], "at least one image"),
        ("no/such/file.png", "no such file"),
    ],
)
def test_bad_images_get_one_sentence(tokenizer: TokenFlow, bad: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tokenizer.encode(bad)


def test_bad_ids_get_one_sentence(tokenizer: TokenFlow) -> None:
    for ids, message in [
        (torch.zeros(1, 21), r"ids: expected int64 \[B, 21\].* got float32 \[1, 21\]"),
        (torch.full((1, 21), 64), "values from 0 to 63, got values from 64 to 64"),
        (torch.zeros(1, 20, dtype=torch.int64), r"whole scales only: \[1, 5, 21\]"),
    ]:
        with pytest.raises(ValueError, match=message):
            tokenizer.decode_ids(ids)


def test_bad_directories_get_one_sentence(tokenizer: TokenFlow, tmp_path: Path) -> None:
    good = tmp_path / "good"
    tokenizer.save(good)

    def broken(name: str, change) -> Path:
        copy = tmp_path / name
        tokenizer.save(copy)
        change(copy)
        return copy

    def edit(**changes: object):
        def change(folder: Path) -> None:
            data = json.loads((folder / "config.json").read_text())
            (folder / "config.json").write_text(json.dumps({**data, **changes}))

        return change

    def truncate(folder: Path) -> None:
        data = (folder / "model.safetensors").read_bytes()
        (folder / "model.safetensors").write_bytes(data[: len(data) // 2])

    config = json.loads((good / "config.json").read_text())["config"]
    smaller = {**config, "quantizer": {**config["quantizer"], "codebook_size": 32}}
    for folder, message in [
        (tmp_path / "nothing", "directory written by save, or a hub id"),
        (broken("family", edit(family="nonsense")), r"family: expected one of \[.*'tokenflow'.*\], got 'nonsense'"),
        (broken("truncated", truncate), "expected a whole safetensors file"),
        (
            broken("shape", edit(config=smaller)),
            r"of another shape: .*codebooks.0 \(expected \[32, 8\], got \[64, 8\]\)",
        ),
        (
            broken("key", edit(config={**config, "scale": 1})),
            "config.json.config.scale: unknown key; did you mean 'scales'",
        ),
        (broken("json", lambda f: (f / "config.json").write_text("{")), "expected valid JSON"),
        (broken("weights", lambda f: (f / "model.safetensors").unlink()), "no such file"),
    ]:
        with pytest.raises(ValueError, match=message):
            tmm.load(str(folder))


def test_one_scale_is_a_configuration() -> None:
    config = dataclasses.replace(tiny_config(), scales=((4, 4),))
    tokenizer = TokenFlow.from_config(config).eval()
    assert tokenizer.encode(torch.zeros(1, 3, 32, 32)).ids.shape == (1, 16)
