"""The discriminator of a tokenizer's training: its term in the tokenizer's loss, and its own loss."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from tokenizers_mm._ranks import mean_over_ranks
from tokenizers_mm.functional.adversarial import (
    adaptive_weight,
    hinge_discriminator,
    hinge_generator,
    lecam,
    logistic_discriminator,
    non_saturating_generator,
    r1_penalty,
)
from tokenizers_mm.functional.precision import at_least_float32
from tokenizers_mm.losses.discriminators import DISCRIMINATORS, DINODiscriminator

if TYPE_CHECKING:
    from .terms import LossConfig

LOSSES = {
    "hinge": (hinge_generator, hinge_discriminator),
    "non_saturating": (non_saturating_generator, logistic_discriminator),
}
"""Losses of generator and discriminator by name."""


LECAM_DECAY = 0.99
"""Decay of the moving averages of logits (Tseng et al., arXiv 2104.03310, section 4)."""


class Adversary:
    """A discriminator, and the pairs of real and reconstructed images that it learns from in the present step."""

    def __init__(self, loss: "LossConfig", device: torch.device) -> None:
        self.network: nn.Module = DISCRIMINATORS[loss.discriminator.kind](loss.discriminator)
        if isinstance(self.network, DINODiscriminator) and loss.discriminator.pretrained:
            self.network.load_pretrained()
        self.network.to(device)
        self._learning = [parameter for parameter in self.network.parameters() if parameter.requires_grad]
        self.config, self.adaptive = loss, loss.adaptive
        self.means = {"real": torch.zeros((), device=device), "fake": torch.zeros((), device=device)}
        self._logits: list[Tensor] = []
        self._generator, self._discriminator = LOSSES[loss.gan]
        self._pairs: list[tuple[Tensor, Tensor]] = []

    def generator_term(self, x: Tensor, image: Tensor, visible: Sequence[Tensor], last_layer: nn.Parameter) -> Tensor:
        """Adversarial term of reconstructions; the discriminator collects no gradient from it.

        visible: weighted terms of the image, to whose gradient at `last_layer` an adaptive weight relates this term's.
        """
        self._pairs.append((x, image.detach()))
        self._let_learn(False)
        term = self._generator(self._judged(image))
        self._let_learn(True)
        if not self.adaptive or not torch.is_grad_enabled():
            return term
        return term * adaptive_weight(torch.stack(list(visible)).sum(), term, last_layer)

    def _let_learn(self, learns: bool) -> None:
        """Let the parameters of the discriminator that are not frozen collect gradients or not."""
        for parameter in self._learning:
            parameter.requires_grad_(learns)

    def _judged(self, image: Tensor) -> Tensor:
        """Logits of the discriminator."""
        return at_least_float32(self.network(image))

    def weights(self) -> dict[str, float]:
        """Weights of the terms of `terms`, by name."""
        found = {"discriminator": self.config.weight("generator"), "lecam": self.config.lecam, "r1": self.config.r1}
        return {name: weight for name, weight in found.items() if weight}

    def terms(self) -> dict[str, Tensor]:
        """Terms of the discriminator's loss on the oldest pair that it has not seen."""
        real, fake = self._pairs.pop(0)
        real = real.detach().requires_grad_(bool(self.config.r1))
        real_logits, fake_logits = self._judged(real), self._judged(fake)
        found = {"discriminator": self._discriminator(real_logits, fake_logits)}
        if self.config.lecam:
            found["lecam"] = lecam(real_logits, fake_logits, self.means["real"], self.means["fake"])
            self._logits.append(torch.stack([real_logits.detach().mean(), fake_logits.detach().mean()]))
        if self.config.r1:
            found["r1"] = r1_penalty(real, real_logits)
        return found

    def after_step(self) -> None:
        """Move the averages of logits that LeCam compares with, over all ranks."""
        if not self._logits:
            return
        mean, self._logits = mean_over_ranks(torch.stack(self._logits).mean(0)), []
        for name, value in zip(("real", "fake"), mean, strict=True):
            self.means[name] = LECAM_DECAY * self.means[name] + (1 - LECAM_DECAY) * value

    def state_dict(self) -> dict[str, Tensor]:
        """The averages."""
        return dict(self.means)

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Restore the averages."""
        self.means = {name: state[name].to(value.device) for name, value in self.means.items()}
