"""Weights that are not finite end in an error that names the module, in every family, in inference and in training."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from tests import mar_cases
from tests.models import test_dualvitok, test_semantic, test_tokenflow, test_vqgan
from tokenizers_mm import kernels
from tokenizers_mm.models import MODELS

CONFIGS: dict[str, Callable[[], Any]] = {
    "tokenflow": test_tokenflow.tiny_config,
    "dualvitok": test_dualvitok.tiny_config,
    "mar": mar_cases.tiny_config,
    "vqgan": test_vqgan.tiny_config,
    "semantic": lambda: test_semantic.tiny(pixel_decoder=test_semantic.PIXELS).config,
}
# Family, the weight that is spoilt, what the error must begin with.
CASES = [
    ("tokenflow", "pixel_head.weight", r"pixel_head: expected finite features, got (NaN|infinity) at \["),
    ("tokenflow", "semantic_head.2.bias", r"semantic_head: expected finite features, got (NaN|infinity) at \["),
    (
        "tokenflow",
        "quantizer.quantizer.codebooks.1",
        r"codebooks\[1\]: expected finite codes, got (NaN|infinity) at \[",
    ),
    ("dualvitok", "pixel_head.bias", r"pixel_head: expected finite features, got (NaN|infinity) at \["),
    ("dualvitok", "semantic_encoder.head.project.0.bias", r"semantic_encoder: expected finite features, got"),
    ("dualvitok", "pixel_quantizer.transform.weight", r"codebook: expected finite codes, got (NaN|infinity) at \["),
    ("vqgan", "head.weight", r"head: expected finite features, got (NaN|infinity) at \["),
    ("semantic", "head.bias", r"head: expected finite features, got (NaN|infinity) at \["),
    ("mar", "autoencoder.quant.weight", r"autoencoder: expected finite latents, got (NaN|infinity) at \["),
]


def test_every_family_is_walked() -> None:
    assert {family for family, _, _ in CASES} == set(MODELS) == set(CONFIGS)


@pytest.mark.parametrize("mode", ["auto", "reference"])
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize(("family", "weight", "message"), CASES)
def test_the_error_names_the_module(family: str, weight: str, message: str, value: float, mode: str) -> None:
    torch.manual_seed(0)
    model = MODELS[family].from_config(CONFIGS[family]())
    x = torch.rand(2, 3, *(model.image_size or (64, 64))) * 2 - 1
    with kernels.use_kernels(mode):
        model.eval().encode(x)
        parameters: dict[str, Tensor] = dict(model.named_parameters())
        parameters[weight].data.view(-1)[0] = value
        with pytest.raises(ValueError, match="^" + message):
            model.encode(x)
        model.train()
        if family == "mar":
            with pytest.raises(ValueError, match="^" + message):
                model.encode_tensor(x, torch.randn(2, 4, 8, 8))  # type: ignore[call-arg]
        else:
            with pytest.raises(ValueError, match="^" + message):
                model(x)
