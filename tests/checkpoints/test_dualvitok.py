"""Converting DualViTok's checkpoints: names, strictness, trainers' files."""

import json
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

import tokenizers_mm as tmm
from tests.cases import case
from tests.dualvitok_weights import dualvitok_weights
from tokenizers_mm.checkpoints.convert import convert
from tokenizers_mm.checkpoints.dualvitok import PUBLISHED, links_of, read_config
from tokenizers_mm.checkpoints.upstream import give
from tokenizers_mm.models import DualViTok
from tokenizers_mm.models.loading import build


def test_published_names_and_shapes() -> None:
    """All 999 tensors of the published checkpoint, and no other, without memory for them."""
    reference = case("dualvitok/full_size")
    theirs = {k: tuple(v["shape"]) for k, v in json.loads((reference.folder / "state_keys.json").read_text()).items()}
    assert read_config(PUBLISHED) == read_config(reference.config)
    schema = read_config(PUBLISHED)
    model = build(DualViTok, schema)
    links = links_of(schema, {name: tuple(t.shape) for name, t in model.state_dict().items()})
    assert {name: item.their_shape for item in links for name in item.theirs} == theirs
    assert sum(p.numel() for p in model.parameters()) == 1_345_978_979
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == 670_219_875


def test_convert_load_and_back(tmp_path: Path) -> None:
    reference = case("dualvitok/small_nodc_mlp_rot")
    weights = dualvitok_weights(reference)
    save_file(weights, tmp_path / "model.safetensors")
    out = convert("dualvitok", tmp_path / "model.safetensors", tmp_path / "out", reference.config)
    model = tmm.load(out)
    assert model.provenance.license == "Apache-2.0"
    assert len(model.provenance.sha256) == 64
    x = reference.inputs["b.image"]
    assert torch.equal(model.encode(x).stream("pixel"), reference.outputs["b.pixel_indices"].flatten(1))
    links = links_of(model.config, {name: tuple(t.shape) for name, t in model.state_dict().items()})
    back = give(links, model.state_dict())
    assert back.keys() == weights.keys()
    assert all(torch.equal(back[name], weights[name]) for name in weights)


def test_wrong_files_get_one_sentence(tmp_path: Path) -> None:
    reference = case("dualvitok/small_nodc_mlp_rot")
    weights = dualvitok_weights(reference)
    first, *_ = weights
    for name, change, message in [
        ("missing", {first: None}, f"1 missing: {first}"),
        ("unknown", {"extra.weight": torch.zeros(1)}, "1 unknown: extra.weight"),
        ("shape", {first: torch.zeros(3, 3)}, f"1 of another shape: {first}"),
    ]:
        changed = {key: value for key, value in {**weights, **change}.items() if value is not None}
        save_file(changed, tmp_path / f"{name}.safetensors")
        with pytest.raises(ValueError, match=message):
            convert("dualvitok", tmp_path / f"{name}.safetensors", tmp_path / name, reference.config)
        assert not (tmp_path / name).exists()
    config = reference.config
    config["vq_model"]["config"]["pixel_quantizer"]["type"] = "FSQ"
    save_file(weights, tmp_path / "good.safetensors")
    with pytest.raises(ValueError, match=r"pixel_quantizer.type: expected 'SimVQ', got 'FSQ'"):
        convert("dualvitok", tmp_path / "good.safetensors", tmp_path / "out", config)
    with pytest.raises(ValueError, match="exactly the tensors of the model"):
        convert("dualvitok", tmp_path / "good.safetensors", tmp_path / "out")  # not the published size
    with pytest.raises(ValueError, match=r"vit_config.embed_dim: expected a value, got nothing"):
        convert(
            "dualvitok", tmp_path / "good.safetensors", tmp_path / "out", {"vq_model": reference.config["vq_model"]}
        )


def test_a_trainers_file_with_its_configuration_is_read_without_running_it(tmp_path: Path) -> None:
    """The original's trainer pickles an object of its own package beside the weights."""
    reference = case("dualvitok/small_nodc_mlp_rot")
    weights = dualvitok_weights(reference)
    package = types.ModuleType("trainer_config")

    class Config(dict[str, Any]):
        def __init__(self, *args: Any, **options: Any) -> None:
            super().__init__(*args, **options)
            self.lr = 1e-4

        def __setstate__(self, state: Any) -> None:
            raise AssertionError("code of the checkpoint was run")

    Config.__module__, Config.__qualname__ = package.__name__, "Config"
    package.Config = Config  # type: ignore[attr-defined]
    sys.modules[package.__name__] = package
    try:
        data = {"model": weights, "args": Config(vq_model={"lr": 1e-4}), "steps": 3, "optimizer": {"state": {}}}
        torch.save(data, tmp_path / "0000003.pt")
    finally:
        del sys.modules[package.__name__]
    out = convert("dualvitok", tmp_path / "0000003.pt", tmp_path / "out", reference.config)
    assert "trainer_config" not in sys.modules
    x = reference.inputs["b.image"]
    assert torch.equal(tmm.load(out).encode(x).stream("pixel"), reference.outputs["b.pixel_indices"].flatten(1))


def test_files_that_would_run_code_are_refused(tmp_path: Path) -> None:
    class Harm:
        def __reduce__(self) -> tuple[Any, ...]:
            return eval, ("open('harm', 'w')",)

    class Touch:
        def __reduce__(self) -> tuple[Any, ...]:
            return Path.touch, (tmp_path / "harm",)

    for index, harm in enumerate((Harm(), Touch())):
        torch.save({"model": {"a": torch.zeros(1)}, "args": harm}, tmp_path / f"{index}.pt")
        with pytest.raises(ValueError, match="nothing but weights"):
            convert("dualvitok", tmp_path / f"{index}.pt", tmp_path / "out")
    assert not (tmp_path / "harm").exists()
