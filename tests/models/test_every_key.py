"""No key of a tokenizer is without effect: another value is another model, or one sentence before it is built."""

from typing import Any

import pytest
import torch

from tests import mar_cases
from tests.keys import another, at, changed, dotted, fields
from tests.models import test_dualvitok, test_semantic, test_tokenflow, test_vqgan
from tokenizers_mm.config import from_mapping, to_mapping
from tokenizers_mm.encoders.semantic import SemanticEncoderConfig
from tokenizers_mm.models import MAR, MODELS

pytestmark = pytest.mark.usefixtures("one_thread")

CONFIGS: dict[str, Any] = {
    "tokenflow": test_tokenflow.tiny_config,
    "dualvitok": test_dualvitok.tiny_config,
    "mar": mar_cases.tiny_config,
    "vqgan": test_vqgan.tiny_config,
    "semantic": lambda: test_semantic.tiny(pixel_decoder=test_semantic.PIXELS).config,
}

ELSEWHERE = {(SemanticEncoderConfig, "pretrained")}
"""Keys that need a network to have an effect."""

OTHER: dict[str, Any] = {
    "entropy_temperature": 0.5,
    "attention_levels": [0],
    "name": "nothing",
    "frozen_dim": 16,
}
"""Other values, by the end of a key, where a little more will not do."""


def outcome(family: str, data: dict[str, Any]) -> Any:
    """Weights, outputs and terms of a model of seed 0 in training; the sentence of an error."""
    torch.manual_seed(0)
    try:
        config = from_mapping(MODELS[family].Config, data)
        model: Any = MODELS[family].from_config(config).train()
        x = torch.rand(2, 3, *(model.image_size or (64, 64))) * 2 - 1
        torch.manual_seed(1)
        found = model.reconstruct(x)
        made = [found.image, found.semantic, found.target]
        for quantized in found.quantized.values():
            made += [quantized.ids, quantized.vectors, *(quantized.terms or {}).values()]
        if isinstance(model, MAR):
            made += generated(model, x)
    except ValueError as error:
        return str(error)
    shapes = [(name, tuple(tensor.shape)) for name, tensor in model.state_dict().items()]
    return shapes, [None if tensor is None else tensor.detach().double().sum().item() for tensor in made]


def generated(model: MAR, x: torch.Tensor) -> list[torch.Tensor]:
    """The two terms of MAR's own training."""
    latents = model.encode_tensor(x)
    rows = [torch.Generator().manual_seed(index) for index in range(len(x))]
    draws = model.draw(len(x), latents.values.shape[1], torch.Generator().manual_seed(9), rows)
    terms = model(latents.values, latents.grid, draws, model.encoder.no_class.expand(len(x), -1))
    return [terms.noise, terms.bound]


@pytest.mark.parametrize("family", MODELS)
def test_every_key_of_a_family(family: str) -> None:
    walk(family, CONFIGS[family]())


def walk(family: str, config: Any) -> None:
    data = to_mapping(config)
    expected = outcome(family, data)
    assert isinstance(expected, tuple), expected
    silent = []
    for path, schema, name in fields(config):
        if name != "kind" and (schema, name) not in ELSEWHERE:
            try:
                value = another(path, schema, at(data, path), OTHER)
            except AssertionError as error:
                silent.append(str(error))
                continue
            found = outcome(family, changed(data, path, value))
            silent += [dotted(path)] if found == expected else []
            if isinstance(found, str) and "expected " not in found:
                silent.append(f"{dotted(path)}: {found}")
    assert not silent
