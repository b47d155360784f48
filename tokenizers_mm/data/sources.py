"""Endless streams of samples in which a position decides everything, so that training can go on at any step.

A source is a mixture of the built-in photographs, rendered scenes and folders of images. Position p gives the same
sample whatever came before it, in whichever worker process it is made.
"""

import random
import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from hashlib import blake2b
from pathlib import Path
from typing import Any, Literal

import torch
from PIL import Image, ImageEnhance
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from tokenizers_mm._check import fail, require
from tokenizers_mm._images import image_to_tensor, read_image
from tokenizers_mm.data.buckets import AnySize, BucketBatches, BucketConfig
from tokenizers_mm.data.captions import read_caption
from tokenizers_mm.data.photographs import photographs
from tokenizers_mm.data.scenes import make_scene
from tokenizers_mm.data.transforms import random_crop, random_flip, random_patch

EXTENSIONS = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff", ".gif", ".ppm")


@dataclass(frozen=True)
class SourceConfig:
    """One part of a mixture.

    kind: "photographs" (built in), "scenes" (rendered, with captions) or "folder" (images below `path`; a text file of
    the same name beside an image is its caption).
    weight: share of the samples. zoom: for photographs, bounds of output pixels per picture pixel. colour: strength of
    random brightness, contrast, saturation and hue, from 0 (none) to 1. turns: turn by multiples of 90 degrees too.
    """

    kind: Literal["photographs", "scenes", "folder"]
    path: str = ""
    weight: float = 1.0
    zoom: tuple[float, float] = (0.5, 1.5)
    colour: float = 0.0
    turns: bool = False


@dataclass(frozen=True)
class DataConfig:
    """Training samples: a mixture of sources, and the worker processes that decode them (0: in the main process).

    For a tokenizer that takes any size, one of two says which: image_size (height, width) for all samples, or buckets
    of sizes by the pictures' own shapes, for folders of images.
    """

    sources: tuple[SourceConfig, ...] = field(default_factory=lambda: (SourceConfig("photographs"),))
    workers: int = 0
    image_size: tuple[int, int] | None = None
    buckets: BucketConfig | None = None


@dataclass(frozen=True)
class Batch:
    """`images` float [B, 3, H, W] in [-1, 1], their captions ("" for none), and what was skipped and why."""

    images: Tensor
    captions: list[str]
    skipped: list[str]

    def pin_memory(self) -> "Batch":
        """For the loader's pinning thread."""
        return Batch(self.images.pin_memory(), self.captions, self.skipped)


class Mixture(Dataset[dict[str, Any]]):
    """Samples by position. A file that cannot be read is skipped for the next one of its folder, and reported."""

    def __init__(self, config: DataConfig, image_size: tuple[int, int], seed: int) -> None:
        require(len(config.sources) > 0, "data.sources", "at least one source", "none")
        self.config, self.image_size, self.seed, self.workers = config, image_size, seed, config.workers
        self.files = [list_images(s.path) if s.kind == "folder" else [] for s in config.sources]

    def __getitem__(self, position: int) -> dict[str, Any]:
        rng = random.Random(mix_seeds(self.seed, position))
        weights = [source.weight for source in self.config.sources]
        index = rng.choices(range(len(weights)), weights)[0]
        source = self.config.sources[index]
        if source.kind == "scenes":
            scene = make_scene(mix_seeds(self.seed, position, 1) >> 24)
            height, width = self.image_size
            image = scene.render(max(height, width)).resize((width, height))
            return {
                "image": image_to_tensor(image),
                "caption": scene.caption,
                "skipped": [],
            }
        if source.kind == "photographs":
            picture = rng.choice(list(photographs("train").values()))
            image = random_patch(picture, self.image_size, rng, source.zoom)
            return {"image": self._augmented(image, source, rng), "caption": "", "skipped": []}
        return self._from_folder(self.files[index], source, position, rng)

    def _from_folder(
        self, files: list[Path], source: SourceConfig, position: int, rng: random.Random
    ) -> dict[str, Any]:
        """File `position` of a random order that is new in every pass."""
        epoch, place = divmod(position, len(files))
        order = random.Random(mix_seeds(self.seed, epoch, 2)).sample(range(len(files)), len(files))
        skipped: list[str] = []
        for offset in range(len(files)):
            path = files[order[(place + offset) % len(files)]]
            try:
                picture = read_image(path)
            except ValueError as error:
                skipped.append(str(error))
                continue
            height, width = self.image_size
            require(height == width, "image_size", "a square for folders of images", self.image_size)
            image = self._augmented(random_crop(picture, height, rng), source, rng)
            return {"image": image, "caption": read_caption(path, skipped), "skipped": skipped}
        fail("data.path", "a folder with at least one readable image", skipped[0])

    def _augmented(self, image: Image.Image, source: SourceConfig, rng: random.Random) -> Tensor:
        image = random_flip(image, rng, source.turns)
        if source.colour > 0:
            for enhance in (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color):
                image = enhance(image).enhance(1 + source.colour * rng.uniform(-1, 1))
            hue, saturation, value = image.convert("HSV").split()
            turn = round(128 * source.colour * rng.uniform(-1, 1))
            image = Image.merge("HSV", (hue.point([(h + turn) % 256 for h in range(256)]), saturation, value)).convert(
                "RGB"
            )
        return image_to_tensor(image)


class Positions(Sampler[list[int]]):
    """Endless batches of positions for one of `world` ranks, beginning at a step: this is all there is to resuming."""

    def __init__(self, batch_size: int, start_step: int = 0, rank: int = 0, world: int = 1) -> None:
        self.batch_size, self.start_step, self.rank, self.world = batch_size, start_step, rank, world

    def __iter__(self) -> Iterator[list[int]]:
        step = self.start_step
        while True:
            first = (step * self.world + self.rank) * self.batch_size
            yield list(range(first, first + self.batch_size))
            step += 1


def make_loader(dataset: Mixture | AnySize, positions: Positions | BucketBatches) -> "DataLoader[Any]":
    """Batches decoded in worker processes, in the order of the positions."""
    workers = dataset.workers
    return DataLoader(
        dataset,
        batch_sampler=positions,
        collate_fn=collate,
        num_workers=workers,
        persistent_workers=workers > 0,
        prefetch_factor=4 if workers > 0 else None,
        pin_memory=torch.cuda.is_available(),
    )


def collate(samples: Sequence[dict[str, Any]]) -> Batch:
    """Samples to one batch."""
    return Batch(
        torch.stack([sample["image"] for sample in samples]),
        [sample["caption"] for sample in samples],
        [name for sample in samples for name in sample["skipped"]],
    )


def list_images(folder: str | Path) -> list[Path]:
    """All image files below a folder, sorted; an empty or missing folder is an error."""
    if not Path(folder).is_dir():
        fail("images", "a folder", f"{str(folder)!r}")
    files = sorted(path for path in Path(folder).rglob("*") if path.suffix.lower() in EXTENSIONS and path.is_file())
    require(len(files) > 0, "images", f"image files ({', '.join(EXTENSIONS)}) below {str(folder)!r}", "none")
    return files


def mix_seeds(*numbers: int) -> int:
    """A seed (64 bits, not negative) that depends on all of several numbers, the same on every machine."""
    return int.from_bytes(blake2b(struct.pack(f"<{len(numbers)}q", *numbers), digest_size=8).digest(), "little")
