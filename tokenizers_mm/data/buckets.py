"""Batches of one size from images of many: buckets by size, a new order in every pass, nothing ever transposed.

An image is scaled to a bounded area at its own aspect ratio and cut to a coarse grid of sizes; images that meet in
one size form batches. As in `data.sources`, a position decides everything, so that training can go on at any step.
"""

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch.utils.data import Dataset, Sampler

from tokenizers_mm._check import fail, require
from tokenizers_mm._images import image_to_tensor
from tokenizers_mm.data.image_sets import Source
from tokenizers_mm.data.transforms import Augmentation, augmented
from tokenizers_mm.data.transforms import random_cut as random_cut
from tokenizers_mm.resolutions import Resolutions, Size

ENDLESS_PASS = 1024
"""Images of a pass over sources without end."""


@dataclass(frozen=True)
class BucketConfig:
    """min_pixels, max_pixels: bounds of an image's area. cell: sides are multiples of it, and of `step` above that."""

    min_pixels: int = 32**2
    max_pixels: int = 512**2
    cell: int = 16
    step: int = 64

    def __post_init__(self) -> None:
        low, high = self.min_pixels, self.max_pixels
        require(0 < low <= high, "buckets.min_pixels", f"1 to {high}", low)
        require(
            0 < self.cell <= self.step and self.step % self.cell == 0,
            "buckets.step",
            f"a multiple of {self.cell}",
            self.step,
        )


class Draw(NamedTuple):
    """One sample of a batch: which image, at which size, and a number that seeds all that is random in it."""

    index: int
    size: Size
    seed: int


def bucket_size(height: int, width: int, config: BucketConfig) -> Size:
    """The size that an image is cut to: its smart size (see `Resolutions`), sides rounded down to the grid."""
    rules = Resolutions(pixel_cell=config.cell)
    rows, columns = rules.smart_size(height, width, config.min_pixels, config.max_pixels)
    down = [side // config.step * config.step or side for side in (rows, columns)]
    return down[0], down[1]


class BucketBatches(Sampler[list[Draw]]):
    """Endless batches, each of one size, for one of `world` ranks, beginning at a step.

    In every pass each bucket is shuffled anew and cut into batches, and the batches of all buckets are shuffled anew. A
    bucket's last batch is filled up with other images of the same bucket, so every image is seen in every pass.
    """

    def __init__(
        self, sizes: Sequence[Size], batch_size: int, seed: int, start_step: int = 0, rank: int = 0, world: int = 1
    ) -> None:
        require(len(sizes) > 0 and batch_size > 0, "buckets", "images and a batch size of at least 1", len(sizes))
        self.batch_size, self.seed = batch_size, seed
        self.start_step, self.rank, self.world = start_step, rank, world
        self.buckets: dict[Size, list[int]] = {}
        for index, size in enumerate(sizes):
            self.buckets.setdefault(size, []).append(index)
        self.batches_per_pass = sum(-(-len(members) // batch_size) for members in self.buckets.values())

    def one_pass(self, epoch: int) -> list[list[Draw]]:
        """All batches of a pass over the images, in order."""
        rng = random.Random(f"{self.seed} {epoch}")
        batches = []
        for size, members in sorted(self.buckets.items()):
            order = rng.sample(members, len(members))
            order += rng.choices(members, k=-len(order) % self.batch_size)
            draws = [Draw(index, size, rng.getrandbits(62)) for index in order]
            batches += [draws[start : start + self.batch_size] for start in range(0, len(draws), self.batch_size)]
        rng.shuffle(batches)
        return batches

    def __iter__(self) -> Iterator[list[Draw]]:
        step, epoch, batches = self.start_step, -1, []
        while True:
            wanted, place = divmod(step * self.world + self.rank, self.batches_per_pass)
            if wanted != epoch:
                epoch, batches = wanted, self.one_pass(wanted)
            yield batches[place]
            step += 1


class AnySize(Dataset[dict[str, Any]]):
    """Images of sources, stored or without end; a sample is drawn at the size that its `Draw` says.

    A stored image is scaled until it covers the size and cut at a random place, then changed at random where its source
    is augmented. One that cannot be read is replaced by the next one and reported.
    """

    def __init__(
        self,
        sources: Sequence[Source],
        config: BucketConfig,
        workers: int = 0,
        weights: Sequence[float] = (),
        augmentations: Sequence[Augmentation] = (),
    ) -> None:
        """Reads the header of every stored image for its size; `workers` processes of a loader will decode.

        weights: of the sources, for those without end: how many of their images are in a pass, compared with the
        stored ones, each of which is in a pass once; without stored ones, `ENDLESS_PASS` images in all.
        augmentations: of the sources; by default images are mirrored half of the time.
        """
        self.workers, self.sources, self.skipped = workers, list(sources), []
        weights = weights or [1.0] * len(self.sources)
        self.augmentations = augmentations or [Augmentation()] * len(self.sources)
        ends = [weight for source, weight in zip(self.sources, weights, strict=True) if source.size is not None]
        stored = sum(source.size or 0 for source in self.sources)
        per_weight = stored / sum(ends) if stored and sum(ends) else ENDLESS_PASS / sum(weights)
        self.sizes: list[Size] = []
        places: list[tuple[int, int]] = []
        for number, (source, weight) in enumerate(zip(self.sources, weights, strict=True)):
            for index in range(round(weight * per_weight) if source.size is None else source.size):
                try:
                    size = bucket_size(*source.shape(index), config)
                    name, area = f"image {source.name(index)}", size[0] * size[1]
                    require(area <= 4 * config.max_pixels, name, "a shape that fits buckets.max_pixels", size)
                except ValueError as error:
                    self.skipped.append(str(error))
                    continue
                places.append((number, index))
                self.sizes.append(size)
        require(len(places) > 0, "data", "at least one readable image", self.skipped[:1] or "none")
        self._places = torch.tensor(places)

    def __len__(self) -> int:
        return len(self._places)

    def name(self, index: int) -> str:
        """The name of the image at an index of the pass."""
        number, place = self._places[index].tolist()
        return self.sources[number].name(place)

    def __getitem__(self, draw: Draw) -> dict[str, Any]:
        rng, skipped = random.Random(draw.seed), list[str]()
        for offset in range(len(self)):
            number, index = self._places[(draw.index + offset) % len(self)].tolist()
            source = self.sources[number]
            try:
                image, caption, also = source.sample(index, draw.size, rng)
            except ValueError as error:
                skipped = skipped or [str(error)]
                continue
            image = augmented(image, self.augmentations[number], rng) if source.augmented else image
            return {"image": image_to_tensor(image), "caption": caption, "skipped": skipped or list(also)}
        fail("data", "at least one readable image", skipped[0])
