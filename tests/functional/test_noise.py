"""Noise injection against the original's output for recorded uniforms."""

import pytest
import torch

from tests.cases import case
from tokenizers_mm.functional.multiscale import bicubic_up
from tokenizers_mm.functional.noise import inject_noise


@pytest.mark.parametrize("name", ["small_dc", "small_nodc_mlp_rot"])
@pytest.mark.parametrize("kind", ["random", "zero"])
def test_merged_vectors(name: str, kind: str) -> None:
    stored = case(f"dualvitok/{name}").tensors("train")
    t = {key.split(".", 1)[1]: value for key, value in stored.items() if key.startswith(f"noise_{kind}.")}
    pixel = t["quant_pixel"].permute(0, 2, 3, 1)
    noisy = inject_noise(pixel, t["u_batch"].flatten(), t["u_pos"][:, 0], 0.5, 0.4, kind)  # type: ignore[arg-type]
    semantic = bicubic_up(t["quant_semantic"].permute(0, 2, 3, 1), pixel.shape[1:3])  # type: ignore[arg-type]
    merged = torch.cat([semantic, noisy], -1).permute(0, 3, 1, 2)
    torch.testing.assert_close(merged, t["merged"], atol=1e-6, rtol=0)  # the original against itself: 5e-7
    assert not torch.equal(noisy, pixel)


def test_gradient_reaches_undisturbed_positions_only() -> None:
    vectors = torch.randn(2, 1, 2, 3, requires_grad=True)
    u_sample, u_position = torch.tensor([0.0, 0.9]), torch.tensor([[[0.0, 0.9]], [[0.0, 0.9]]])
    inject_noise(vectors, u_sample, u_position, 0.5, 0.5).sum().backward()
    assert vectors.grad is not None
    assert vectors.grad[..., 0].tolist() == [[[0.0, 1.0]], [[1.0, 1.0]]]


def test_a_batch_of_one_is_left_alone_by_random_noise() -> None:
    vectors = torch.randn(1, 2, 2, 3)
    zeros = torch.zeros(1, 2, 2)
    assert torch.equal(inject_noise(vectors, torch.zeros(1), zeros, 0.5, 0.5), vectors)
    assert inject_noise(vectors, torch.zeros(1), zeros, 0.5, 0.5, "zero").abs().max() == 0
