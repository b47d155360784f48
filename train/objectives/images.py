"""Parts of objectives that train on images: their batches, and a tokenizer with its terms and its discriminator."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tokenizers_mm._check import fail, require
from tokenizers_mm._ranks import rank_and_world
from tokenizers_mm.data.buckets import AnySize, BucketBatches
from tokenizers_mm.data.sources import SOURCES, Batch, DataConfig, Mixture, Positions, make_loader
from tokenizers_mm.eval.pictures import comparison_grid, save_picture
from tokenizers_mm.models import ImageTokenizer
from tokenizers_mm.quantizers.revival import CodebookHealth, RevivalConfig

from ..optim import Learner, OptimizerConfig
from .base import Moment, Networks, Objective, Player, Terms
from .terms import ImageTerms

DISCRIMINATOR = Player("discriminator", ("discriminator",), ("discriminator",))
"""The second backward pass of a step in which the discriminator acts."""

FIXED_DATA = ("data.sources", "data.image_size", "data.buckets")
"""Keys of the data that decide which sample is where."""


class TokenizerObjective(Objective):
    """An objective that trains a tokenizer by `ImageTerms`; `config.loss` configures them.

    tokenizer: the tokenizer. terms: its terms, with the discriminator. health: counts and revival of its codes.
    """

    tokenizer: ImageTokenizer[Any]
    SHOWS = True
    terms: ImageTerms
    health: CodebookHealth

    def adopt(self, networks: Mapping[str, nn.Module], size: tuple[int, int], revival: RevivalConfig) -> None:
        """Take over networks, "tokenizer" among them, and build what its terms need besides.

        size: (height, width) of an image that the tokenizer takes.
        """
        loss = self.config.loss
        if loss.semantic == "contrastive":
            self.config.data.require_captions("config.objective.data")
        self.terms = ImageTerms(loss, self.tokenizer, size)
        related = not loss.adaptive or self.tokenizer.last_layer.requires_grad
        require(related, "config.objective.loss.adaptive", "false where the decoder's last layer is frozen", True)
        self.health = CodebookHealth(self.tokenizer.quantizers(), revival, "config.objective.revival")
        self.networks = {**networks, **self.terms.learning}
        if self.terms.adversary is not None:
            self.networks["discriminator"] = self.terms.adversary.network

    def tunes(self, stage: int) -> bool:
        """True if the tokenizer learns in a stage."""
        return True

    def adversarial(self, moment: Moment) -> bool:
        """True if the discriminator acts."""
        acts = self.terms.adversary is not None and moment.step >= self.config.loss.gan_start
        return acts and self.tunes(moment.stage)

    def discriminator(self, options: OptimizerConfig, begins: int) -> dict[str, Learner]:
        """The discriminator's optimizer, by name; none where there is no discriminator."""
        network = self.networks.get("discriminator")
        return {} if network is None else {"discriminator": Learner(options, list(network.parameters()), begins)}

    def players(self, moment: Moment) -> Sequence[Player]:
        """The discriminator where it acts. The tokenizer, whose pass comes before, is the subclass's."""
        return (DISCRIMINATOR,) if self.adversarial(moment) else ()

    def weights(self, player: str, moment: Moment) -> dict[str, float]:
        """Those of the discriminator's terms."""
        assert self.terms.adversary is not None
        return self.terms.adversary.weights()

    def losses(self, player: str, batch: Any, moment: Moment) -> tuple[Terms, Terms]:
        """The discriminator's terms."""
        assert self.terms.adversary is not None
        return self.terms.adversary.terms(), {}

    def after_step(self, moment: Moment, step: int) -> tuple[dict[str, float], list[dict[str, Any]]]:
        if self.terms.adversary is not None:
            self.terms.adversary.after_step()
        return self.health.after_step(moment.step + 1, moment.progress, moment.once(3)), []

    def window(self) -> dict[str, float]:
        return self.health.window()

    def changing(self) -> dict[str, Any]:
        adversary = self.terms.adversary
        return {"health": self.health} | ({} if adversary is None else {"adversary": adversary})

    def show(self, networks: Networks, path: Path) -> None:
        if self.shown is not None:
            show_reconstructions(networks["tokenizer"], self.shown, path)


def image_size(tokenizer: ImageTokenizer[Any], data: DataConfig) -> tuple[int, int] | None:
    """(height, width) of all images, None with buckets of sizes; what contradicts itself is refused."""
    own, given, where = tokenizer.image_size, data.image_size, "config.objective.data"
    require(own is None or given in (None, own), f"{where}.image_size", f"{own}, the size of the tokenizer", given)
    size = own or given
    if size is None and data.buckets is None:
        fail(where, "image_size or buckets for a tokenizer of any size", "neither")
    if size is not None:
        tokenizer.check_size(*size)
    square = size is not None and size[0] == size[1]
    turned = any(source.turns for source in data.sources)
    require(square or not turned, f"{where}.sources.turns", "false for images that are not square", True)
    if data.buckets is not None:
        require(size is None, f"{where}.buckets", "a tokenizer of any size and no image_size", size)
    return size


def image_batches(
    objective: Objective, data: DataConfig, tokenizer: ImageTokenizer[Any], start: int
) -> Iterator[Batch]:
    """Micro-batches of images of this process from sample `start` of the run on.

    The first one of a run with buckets also reports the images whose header could not be read.
    """
    run, (rank, world) = objective.run, rank_and_world()
    size = image_size(tokenizer, data)
    if data.buckets is None:
        assert size is not None
        dataset, positions = Mixture(data, size, run.seed), Positions(run.batch_size, start, rank, world)
    else:
        sources = [SOURCES[source.kind](source) for source in data.sources]
        weights = [source.weight for source in data.sources]
        augmentations = [source.augmentation for source in data.sources]
        dataset = AnySize(sources, data.buckets, data.workers, weights, augmentations)
        first = start // (run.batch_size * world)
        positions = BucketBatches(dataset.sizes, run.batch_size, run.seed, first, rank, world)
    unread = dataset.skipped if isinstance(dataset, AnySize) and not start and not rank else []
    for batch in make_loader(dataset, positions):
        yield replace(batch, skipped=[*unread, *batch.skipped])
        unread = []


@torch.no_grad()
def show_reconstructions(tokenizer: Any, images: Tensor, path: Path) -> None:
    """Originals over reconstructions, as a PNG file."""
    modes = [(module, module.training) for module in tokenizer.modules()]
    tokenizer.eval()
    decoded = tokenizer.decode(tokenizer.encode(images.to(tokenizer.device))).float().clamp(-1, 1).cpu()
    for module, training in modes:  # a frozen part may be in evaluation mode on its own
        module.training = training
    save_picture(comparison_grid(images, decoded), path)
