"""Batches of one size from pictures of many: buckets by size, a new order in every pass, nothing ever transposed.

A picture is scaled to a bounded area at its own aspect ratio and cut to a coarse grid of sizes; pictures that meet in
one size form batches. As in `data.sources`, a position decides everything, so that training can go on at any step.
"""

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image
from torch.utils.data import Dataset, Sampler

from tokenizers_mm._check import fail, require
from tokenizers_mm._images import image_to_tensor, read_image, read_size, scale_and_cut
from tokenizers_mm.data.captions import read_caption
from tokenizers_mm.data.transforms import random_flip
from tokenizers_mm.resolutions import Resolutions, Size, covering_size


@dataclass(frozen=True)
class BucketConfig:
    """min_pixels, max_pixels: bounds of a picture's area. cell: sides are multiples of it, and of `step` above that."""

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
    """One sample of a batch: which picture, at which size, and a number that seeds all that is random in it."""

    index: int
    size: Size
    seed: int


def bucket_size(height: int, width: int, config: BucketConfig) -> Size:
    """The size that a picture is cut to: its smart size (see `Resolutions`), sides rounded down to the grid."""
    rules = Resolutions(pixel_cell=config.cell)
    rows, columns = rules.smart_size(height, width, config.min_pixels, config.max_pixels)
    down = [side // config.step * config.step or side for side in (rows, columns)]
    return down[0], down[1]


class BucketBatches(Sampler[list[Draw]]):
    """Endless batches, each of one size, for one of `world` ranks, beginning at a step.

    In every pass each bucket is shuffled anew and cut into batches, and the batches of all buckets are shuffled anew. A
    bucket's last batch is filled up with other pictures of the same bucket, so every picture is seen in every pass.
    """

    def __init__(
        self, sizes: Sequence[Size], batch_size: int, seed: int, start_step: int = 0, rank: int = 0, world: int = 1
    ) -> None:
        require(len(sizes) > 0 and batch_size > 0, "buckets", "pictures and a batch size of at least 1", len(sizes))
        self.batch_size, self.seed = batch_size, seed
        self.start_step, self.rank, self.world = start_step, rank, world
        self.buckets: dict[Size, list[int]] = {}
        for index, size in enumerate(sizes):
            self.buckets.setdefault(size, []).append(index)
        self.batches_per_pass = sum(-(-len(members) // batch_size) for members in self.buckets.values())

    def one_pass(self, epoch: int) -> list[list[Draw]]:
        """All batches of a pass over the pictures, in order."""
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
    """Pictures of any size as files; a sample is drawn at the size that its `Draw` says.

    The picture is scaled until it covers the size, cut at a random place, and mirrored half of the time. A file that
    cannot be read is replaced by the next one and reported.
    """

    def __init__(self, files: Sequence[Path], config: BucketConfig, workers: int = 0) -> None:
        """Reads the header of every file for its size; `workers` processes of a loader will decode."""
        self.workers = workers
        self.files, self.sizes, self.skipped = [], [], []
        for file in files:
            try:
                size = bucket_size(*read_size(file), config)
                area = size[0] * size[1]
                require(area <= 4 * config.max_pixels, f"image {file}", "a shape that fits buckets.max_pixels", size)
            except ValueError as error:
                self.skipped.append(str(error))
                continue
            self.files.append(file)
            self.sizes.append(size)
        require(len(self.files) > 0, "data", "at least one readable picture", self.skipped[:1] or "none")

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, draw: Draw) -> dict[str, Any]:
        rng, skipped = random.Random(draw.seed), []
        for offset in range(len(self.files)):
            file = self.files[(draw.index + offset) % len(self.files)]
            try:
                picture = read_image(file)
            except ValueError as error:
                skipped.append(str(error))
                continue
            picture = random_flip(random_cut(picture, draw.size, rng), rng)
            caption = read_caption(file, skipped)
            return {"image": image_to_tensor(picture), "caption": caption, "skipped": skipped}
        fail("data", "at least one readable picture", skipped[0])


def random_cut(picture: Image.Image, size: Size, rng: random.Random) -> Image.Image:
    """Scale (bicubic) until `size` is covered, then cut at a random place along the longer way."""
    scaled = covering_size((picture.height, picture.width), size)
    left, top = rng.randint(0, scaled[1] - size[1]), rng.randint(0, scaled[0] - size[0])
    return scale_and_cut(picture, scaled, (top, left, *size), Image.Resampling.BICUBIC)
