"""The discriminator of a tokenizer's training: its term in the tokenizer's loss, and its own loss."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from tokenizers_mm.functional.adversarial import (
    adaptive_weight,
    hinge_discriminator,
    hinge_generator,
    logistic_discriminator,
    non_saturating_generator,
)
from tokenizers_mm.losses.discriminators import PatchGAN

if TYPE_CHECKING:
    from .terms import LossConfig

LOSSES = {
    "hinge": (hinge_generator, hinge_discriminator),
    "non_saturating": (non_saturating_generator, logistic_discriminator),
}
"""Losses of generator and discriminator by name."""


class Adversary:
    """A discriminator, and the pairs of real and reconstructed images that it learns from in the present step."""

    def __init__(self, loss: "LossConfig", device: torch.device) -> None:
        self.network = PatchGAN(loss.discriminator).to(device)
        self.adaptive = loss.adaptive
        self._generator, self._discriminator = LOSSES[loss.gan]
        self._pairs: list[tuple[Tensor, Tensor]] = []

    def generator_term(self, x: Tensor, image: Tensor, visible: Sequence[Tensor], last_layer: nn.Parameter) -> Tensor:
        """Adversarial term of reconstructions; the discriminator collects no gradient from it.

        visible: weighted terms of the image, to whose gradient at `last_layer` an adaptive weight relates this term's.
        """
        self._pairs.append((x, image.detach()))
        self.network.requires_grad_(False)
        term = self._generator(self.network(image).float())
        self.network.requires_grad_(True)
        if not self.adaptive or not torch.is_grad_enabled():
            return term
        return term * adaptive_weight(torch.stack(list(visible)).sum(), term, last_layer)

    def discriminator_term(self) -> Tensor:
        """Loss of the discriminator on the oldest pair that it has not seen."""
        real, fake = self._pairs.pop(0)
        return self._discriminator(self.network(real).float(), self.network(fake).float())
