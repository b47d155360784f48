"""Tokenizers and images for tests of stable ids, the same on every machine: weights by rule, images by whole numbers.

    ATEN_CPU_CAPABILITY=default ONEDNN_MAX_CPU_ISA=SSE41 TOKENIZERS_MM_ISA=portable \
        python -m tests.stable_cases OUT [COUNT]

writes the stable ids of every tokenizer as OUT (.npz). tests/fixtures/stable/ids.npz was made in this way: with torch's
plain code without AVX, oneDNN limited to SSE 4.1 and the portable kernels.
"""

import dataclasses
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from PIL import Image

import tokenizers_mm as tmm
from tests.models.test_dualvitok import tiny_config as tiny_dualvitok
from tests.models.test_semantic import VARIANTS as SEMANTIC
from tests.models.test_semantic import tiny as tiny_semantic
from tests.models.test_tokenflow import tiny_config as tiny_tokenflow
from tests.models.test_vqgan import tiny as tiny_vqgan
from tests.weights_by_rule import offset_and_amplitude, uniform
from tokenizers_mm.models import DualViTok, ImageTokenizer, TokenFlow
from tokenizers_mm.quantizers import FSQConfig, IBQConfig, LFQConfig, ResidualConfig, VQConfig


def by_rule(tokenizer: ImageTokenizer[Any], seed: int = 0) -> ImageTokenizer[Any]:
    """Give a tokenizer weights that follow from their names."""
    made = {}
    for name, tensor in tokenizer.state_dict().items():
        offset, amplitude = offset_and_amplitude(name, list(tensor.shape))
        amplitude = 1.0 if "codebooks" in name or name.endswith((".codes", ".frozen")) else amplitude
        values = np.float32(offset) + np.float32(amplitude) * uniform(name, list(tensor.shape), seed)
        made[name] = torch.from_numpy(values).to(tensor.dtype)
    tokenizer.load_state_dict(made)
    return tokenizer.eval()


def dual(pixel: Any) -> ImageTokenizer[Any]:
    return by_rule(DualViTok.from_config(dataclasses.replace(tiny_dualvitok(), pixel_quantizer=pixel)))


TOKENIZERS: dict[str, Callable[[], ImageTokenizer[Any]]] = {
    "demo-64": lambda: tmm.load("tokenizers_mm/demo-64"),
    "tokenflow": lambda: by_rule(TokenFlow.from_config(tiny_tokenflow())),
    "dualvitok": lambda: by_rule(DualViTok.from_config(tiny_dualvitok())),
    "vqgan": lambda: by_rule(tiny_vqgan()),
    "semantic": lambda: by_rule(tiny_semantic(**SEMANTIC["features"])),
    "vq": lambda: dual(VQConfig(512, 8)),
    "fsq": lambda: dual(FSQConfig((8, 6, 5), 8)),
    "ibq": lambda: dual(IBQConfig(512, 8)),
    "lfq": lambda: dual(LFQConfig(8, groups=2)),
    "residual": lambda: dual(ResidualConfig(stage=VQConfig(256, 8), depth=3)),
}
"""Every family with ids, and every kind of quantizer in one of them."""


def images(tokenizer: ImageTokenizer[Any], count: int) -> torch.Tensor:
    """Images [count, 3, H, W] with smooth parts, edges and noise, made by whole numbers alone."""
    height, width = tokenizer.image_size or (32, 64)
    rng = np.random.default_rng(7)
    row, column = np.mgrid[:height, :width]
    made = []
    for index in range(count):
        slopes = rng.integers(-4, 5, (2, 3, 1, 1))
        values = 128 + (slopes[0] * (row - height // 2) + slopes[1] * (column - width // 2)) * 64 // height
        top, left = (int(value) for value in rng.integers(0, (height, width)))
        values[:, top : top + height // 2, left : left + width // 2] += rng.integers(-90, 91, (3, 1, 1))
        values = values + rng.integers(-(index % 7) * 8, index % 7 * 8 + 1, values.shape)
        made.append(values.clip(0, 255).astype(np.uint8).transpose(1, 2, 0))
    return torch.stack([torch.from_numpy(each).permute(2, 0, 1).float().div(127.5).sub(1) for each in made])


def as_pil(x: torch.Tensor) -> list[Image.Image]:
    return [Image.fromarray(each.add(1).mul(127.5).round().byte().permute(1, 2, 0).numpy()) for each in x]


def main(out: str, count: str = "12") -> None:
    """Write the stable ids of every tokenizer."""
    found = {}
    for name, build in TOKENIZERS.items():
        tokenizer = build()
        found[name] = tokenizer.encode(images(tokenizer, int(count)), stable=True).ids.numpy().astype(np.int32)
    np.savez_compressed(out, **found)


if __name__ == "__main__":
    main(*sys.argv[1:])
