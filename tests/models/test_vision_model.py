"""Vision models of transformers as towers, without a network: tiny ones with random weights."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import tokenizers_mm as tmm
from tests.cases import ROOT
from tokenizers_mm.config import from_mapping
from tokenizers_mm.encoders.vision_model import MODELS, VisionModel, VisionModelConfig
from tokenizers_mm.models import SemanticConfig, SemanticTokenizer, tokenizer_from
from tokenizers_mm.models.starting import build_tokenizer
from train.config import read_config

pytest.importorskip("transformers", reason="its vision models need transformers")
pytestmark = pytest.mark.usefixtures("one_thread")

SIZES: dict[str, Any] = {
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 24,
    "patch_size": 8,
}
MORE: dict[str, dict[str, Any]] = {
    "clip_vision_model": {"intermediate_size": 24},
    "dinov2": {"mlp_ratio": 2},
    "dinov2_with_registers": {"mlp_ratio": 2, "num_register_tokens": 3},
    "dinov3_vit": {"intermediate_size": 24, "num_register_tokens": 2},
    "siglip_vision_model": {"intermediate_size": 24},
    "vit": {"intermediate_size": 24},
}


def original(kind: str) -> Any:
    """A tiny model; CLIP and DINO start with class tokens of zeros, which no test would miss."""
    from transformers import AutoConfig, AutoModel

    torch.manual_seed(0)
    model = AutoModel.from_config(AutoConfig.for_model(kind, **SIZES, **MORE[kind])).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    return model


def images(count: int = 4, height: int = 24, width: int = 24) -> Tensor:
    return torch.rand(count, 3, height, width, generator=torch.Generator().manual_seed(1)) * 2 - 1


@pytest.mark.parametrize("kind", MODELS)
@torch.no_grad()
def test_a_model_becomes_a_tokenizer(kind: str, tmp_path: Path) -> None:
    """Tokens of the patches as the model itself gives them, normalised its way; the same from a saved directory."""
    model, x = original(kind), images()
    tokenizer = tokenizer_from(model, x, codebook_size=8, iterations=2)
    facts = MODELS[kind]
    normed = ((x + 1) / 2 - torch.tensor(facts.mean).view(3, 1, 1)) / torch.tensor(facts.std).view(3, 1, 1)
    patches = model(pixel_values=normed).last_hidden_state[:, -9:]
    assert torch.allclose(tokenizer.tower_features(x).flatten(1, 2), patches, atol=1e-5)
    codes = tokenizer.encode(x)
    assert codes.ids.shape == (4, 9)
    assert tokenizer.decode(codes).shape == x.shape
    tokenizer.save(tmp_path)
    loaded = tmm.load(tmp_path)
    assert isinstance(loaded, SemanticTokenizer)
    assert torch.equal(loaded.encode(x).ids, codes.ids)
    assert not [buffer for buffer in loaded.buffers() if buffer.is_meta]
    assert json.loads((tmp_path / "config.json").read_text())["config"]["tower"]["model"] == kind


@pytest.mark.parametrize("kind", MODELS)
def test_sizes_other_than_the_trained_one_and_every_weight_learns(kind: str) -> None:
    tower = VisionModel(from_mapping(VisionModelConfig, {"model": kind, "options": {**SIZES, **MORE[kind]}}))
    tokens = tower(images(1, 16, 40))
    assert tokens.shape == (1, 2, 5, 16)
    tokens.square().sum().backward()
    assert not [name for name, p in tower.named_parameters() if p.grad is None]


def test_a_directory_and_a_configuration(tmp_path: Path) -> None:
    """The part for images of a whole CLIP, with the statistics of its preprocessor; random weights from sizes alone."""
    from transformers import CLIPConfig, CLIPModel

    text = {**SIZES, "vocab_size": 20, "intermediate_size": 24}
    whole = CLIPModel(CLIPConfig(text_config=text, vision_config={**SIZES, "intermediate_size": 24})).eval()
    whole.save_pretrained(tmp_path)
    (tmp_path / "preprocessor_config.json").write_text(json.dumps({"image_mean": [0.1] * 3, "image_std": [0.2] * 3}))
    x = images()
    tokenizer = tokenizer_from(str(tmp_path), x, codebook_size=8, iterations=2)
    with torch.no_grad():
        expected = whole.vision_model(pixel_values=((x + 1) / 2 - 0.1) / 0.2).last_hidden_state[:, 1:]
    assert torch.allclose(tokenizer.tower_features(x).flatten(1, 2), expected, atol=1e-5)
    assert tokenizer.config.tower.mean == (0.1, 0.1, 0.1)
    started = tokenizer_from(whole.config.vision_config, x, codebook_size=8, iterations=2)
    assert started.config.tower.options == tokenizer.config.tower.options
    (tmp_path / "model.safetensors").unlink()
    torch.save(whole.state_dict(), tmp_path / "pytorch_model.bin")  # a pickle, which is not read
    with pytest.raises(ValueError, match="weights in safetensors"):
        tokenizer_from(str(tmp_path), x, codebook_size=8)


def test_a_run_starts_from_published_weights(tmp_path: Path) -> None:
    """The recipe with its names changed: weights of the directory, and its sizes must be those of the configuration."""
    model = original("dinov2")
    model.save_pretrained(tmp_path / "dinov2")
    model_config = "objective.model.config."
    changes = {f"tower.options.{name}": value for name, value in SIZES.items()}
    changes |= {"tower.pretrained": tmp_path / "dinov2", "image_size": "[24,24]", "cell": 8, "quantizer.dim": 16}
    changes |= {"quantizer.codebook_size": 8, "pixel_decoder.in_channels": 16, "pixel_decoder.head_patch": 4}
    overrides = [f"{model_config}{name}={value}" for name, value in changes.items()]
    recipe = str(ROOT / "configs" / "encoder_codes_dinov2.yaml")
    with pytest.raises(ValueError, match="options: expected the sizes of the published model"):
        build_tokenizer(read_config(recipe, overrides).objective.model)
    overrides.append(f"{model_config}tower.options.mlp_ratio=2")
    tokenizer: Any = build_tokenizer(read_config(recipe, overrides).objective.model)
    state = model.state_dict()
    assert all(torch.equal(tensor, state[name]) for name, tensor in tokenizer.tower.tower.state_dict().items())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": "bert"}, "model: expected"),
        ({"options": {**SIZES, "auto_map": {"AutoModel": "evil.Model"}}}, "auto_map"),
        ({"options": {**SIZES, "hidden_size": 15}}, "options.hidden_size: expected a multiple of 2"),
        ({"options": {**SIZES, "rope_theta": 5.0}}, r"options: expected keys of dinov2, got \['rope_theta'\]"),
        ({"options": {**SIZES, "hidden_act": "os.system"}}, "hidden_act"),
        ({"mean": [0, 0, 0]}, "mean and std: expected both or neither"),
    ],
)
def test_settings_that_cannot_be_used(changes: dict[str, Any], message: str) -> None:
    data = {"model": "dinov2", "options": SIZES, **changes}
    with pytest.raises(ValueError, match=message):
        VisionModel(from_mapping(VisionModelConfig, data))
    whole = {"tower": {"kind": "transformers", **data}, "quantizer": {"codebook_size": 8, "dim": 16}, "cell": 8}
    with pytest.raises(ValueError, match=message):
        SemanticTokenizer.from_config(
            from_mapping(SemanticConfig, {**whole, "semantic_decoder": {"width": 16, "heads": 2}})
        )


def test_names_that_cannot_be_used(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "bert"}))
    for name, message in [
        (str(tmp_path), "pretrained: expected one of the models"),
        (object(), "name: expected one of the models"),
        (original("dinov2"), "options and pretrained: expected nothing with such a model"),
    ]:
        options: dict[str, Any] = {"options": {"depth": 1}} if "such" in message else {}
        with pytest.raises(ValueError, match=message):
            tokenizer_from(name, images(), codebook_size=8, **options)
