"""MAR built as a reference case describes it, and comparison at a tolerance relative to the largest value."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from tests.cases import Case
from tokenizers_mm.checkpoints.mar import kl_links_of, links_of, read_config
from tokenizers_mm.checkpoints.upstream import Link, give, take
from tokenizers_mm.decoders.diffusion import TokenDenoiserConfig
from tokenizers_mm.decoders.mar import MARDecoderConfig
from tokenizers_mm.decoders.pixel import PixelDecoderConfig
from tokenizers_mm.encoders.mar import MAREncoderConfig
from tokenizers_mm.encoders.pixel import PixelEncoderConfig
from tokenizers_mm.models import MAR, MARConfig
from tokenizers_mm.models.kl import KLAutoencoder, KLConfig

NETWORK, GENERATION, GRADIENT = 1e-5, 2e-4, 1e-5
"""Fractions of max|x|: the tolerances that come with the cases; the original against itself differs by up to 3e-6."""


def tiny_config() -> MARConfig:
    """A model for tests that need no reference: factor 8, 4 channels, 4 x 4 tokens, 3 buffers, 5 classes."""
    pixel = {"channels": 32, "multipliers": (1, 1), "num_blocks": 1, "num_groups": 8}
    sizes = {"width": 24, "depth": 2, "heads": 2, "grid": (4, 4), "num_buffers": 3}
    return MARConfig(
        autoencoder=KLConfig(
            PixelEncoderConfig(8, **pixel, attention_levels=(1,), stem_patch=4),
            PixelDecoderConfig(4, **pixel, attention_levels=(), head_patch=4),
        ),
        encoder=MAREncoderConfig(token_dim=4, num_classes=5, **sizes),
        decoder=MARDecoderConfig(encoder_width=24, **sizes),
        denoiser=TokenDenoiserConfig(token_dim=4, condition_dim=24, width=32, depth=2),
    )


def build(reference: Case) -> tuple[MAR, list[Link]]:
    """The model of a case with its weights, in evaluation mode, and the links to the published names."""
    state = reference.tensors("state_dict")
    prefix = "mar." if any(name.startswith("mar.") for name in state) else ""
    with_kl = any(name.startswith("vae.") for name in state)
    own = {n: t for n, t in state.items() if n.startswith(prefix) and not n.startswith(("vae.", "llm.", "proj_"))}
    dim = own[f"{prefix}z_proj.weight"].shape[1]
    kl = {n: t for n, t in state.items() if n.startswith("vae.")} if with_kl else _kl_shapes(dim)
    model = MAR.from_config(read_config(own, kl, reference.name, reference.config))
    shapes = {name: tuple(t.shape) for name, t in model.state_dict().items()}
    links = links_of({n: s for n, s in shapes.items() if not n.startswith("autoencoder.")}, prefix)
    values = take(links, own, reference.name)
    if with_kl:
        kl_links = kl_links_of({n: s for n, s in shapes.items() if n.startswith("autoencoder.")}, "vae.")
        values |= take(kl_links, kl, reference.name)
    model.load_state_dict({**model.state_dict(), **values})
    return model.eval(), links


def gradients(model: MAR, links: list[Link]) -> dict[str, Tensor]:
    """Gradients of the model's parameters by published name."""
    return give(links, {name: p.grad for name, p in model.named_parameters() if p.grad is not None})


def assert_close(actual: Tensor, expected: Tensor, tolerance: float, name: str = "") -> None:
    assert actual.shape == expected.shape, (name, actual.shape, expected.shape)
    error = float((actual.detach().double() - expected.double()).abs().max())
    assert error <= tolerance * float(expected.abs().max()), f"{name}: {error / float(expected.abs().max()):.3g}"


def recorded_noise(inputs: Mapping[str, Tensor]) -> Callable[[int, int, int], tuple[Tensor, Tensor]]:
    """The noise of a case; under guidance its second half of rows is never used."""

    def noise(step: int, rows: int, diffusion_steps: int) -> tuple[Tensor, Tensor]:
        first, rest = inputs[f"init_noise_{step}"], inputs[f"step_noise_{step}"]
        assert first.shape[0] == rows
        assert rest.shape[0] == diffusion_steps
        return first, rest[:, :rows]

    return noise


def _kl_shapes(dim: int) -> dict[str, Tensor]:
    """An autoencoder of factor 2 for the cases that have none: the smallest there is."""
    config: dict[str, Any] = {"channels": 32, "multipliers": (1, 1), "num_blocks": 1}
    autoencoder = KLAutoencoder(
        KLConfig(PixelEncoderConfig(2 * dim, **config), PixelDecoderConfig(dim, **config, attention_levels=()))
    )
    shapes = {f"autoencoder.{n}": tuple(t.shape) for n, t in autoencoder.state_dict().items()}
    return {n: torch.empty(item.their_shape) for item in kl_links_of(shapes, "vae.") for n in item.theirs if n}
