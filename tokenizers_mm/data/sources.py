"""Endless streams of samples in which a position decides everything, so that training can go on at any step.

A mixture has one or more sources (`SOURCES`). Position p gives the same sample whatever came before it, in whichever
worker process it is made; every source is gone through pass by pass, each sample once in a pass.
"""

import random
import signal
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from tokenizers_mm._check import fail, require
from tokenizers_mm._images import image_to_tensor
from tokenizers_mm.config import Range
from tokenizers_mm.data.buckets import AnySize, BucketBatches, BucketConfig
from tokenizers_mm.data.files import FileList
from tokenizers_mm.data.files import list_images as list_images
from tokenizers_mm.data.image_sets import ImageFiles, ImageSet, Sample, Source
from tokenizers_mm.data.order import Interleaving, shuffled
from tokenizers_mm.data.order import mix_seeds as mix_seeds
from tokenizers_mm.data.parquet import ParquetImages
from tokenizers_mm.data.photographs import photographs
from tokenizers_mm.data.scenes import make_scene
from tokenizers_mm.data.shards import Shards
from tokenizers_mm.data.text_images import text_image
from tokenizers_mm.data.transforms import Augmentation, augmented, random_crop, random_cut, random_patch

MAX_UNREADABLE = 1000
"""Samples in a row that may be unreadable before a source is given up."""

Positive = Annotated[float, Range(0, low_open=True)]


SOURCES: dict[str, Any] = {}
"""Sources by kind: classes of a `SourceConfig`, with the methods of `Source`."""


class KnownSource:
    """Limit of a text: a key of SOURCES, which may grow at any time."""

    def check(self, value: str, where: str) -> None:
        """Refuse any other text."""
        require(value in SOURCES, where, f"one of {sorted(SOURCES)}", value)

    def __str__(self) -> str:
        return f"one of {', '.join(SOURCES)}"


@dataclass(frozen=True)
class SourceConfig:
    """One part of a mixture.

    kind: "photographs" (built in), "scenes" (rendered, with captions), "text" (rendered words), "folder" (images below
    `path`; a text file of the same name beside an image is its caption), "shards" (tar files, in the same way) or
    "parquet" (columns with the bytes or paths of images, and captions).
    weight: share of the samples. zoom: for photographs, bounds of output pixels per image pixel. colour: strength of
    random brightness, contrast, saturation and hue, from 0 (none) to 1. channels: share of the samples whose colour
    channels change places. turns: turn by multiples of 90 degrees too, for square images.
    """

    kind: Annotated[str, KnownSource()]
    path: str = ""
    weight: Annotated[float, Range(0)] = 1.0
    zoom: tuple[Positive, Positive] = (0.5, 1.5)
    colour: Annotated[float, Range(0, 1)] = 0.0
    channels: Annotated[float, Range(0, 1)] = 0.0
    turns: bool = False

    def check(self) -> None:
        """Refuse a built-in source without its path, and options that it does not have."""
        required, unused = BUILT_IN.get(self.kind, ((), ()))
        for name in required:
            require(bool(getattr(self, name)), name, f"a folder (kind: {self.kind})", "nothing")
        for name in unused:
            value, default = getattr(self, name), getattr(SourceConfig, name)
            require(value == default, name, f"nothing (kind: {self.kind} has no {name})", value)

    @property
    def augmentation(self) -> Augmentation:
        """The changes that are drawn for every sample of an augmented source."""
        return Augmentation(self.colour, self.channels, self.turns)


BUILT_IN = {
    "photographs": ((), ("path",)),
    "scenes": ((), ("path", "zoom", "colour", "channels", "turns")),
    "text": ((), ("path", "zoom")),
    **dict.fromkeys(("folder", "shards", "parquet"), (("path",), ("zoom",))),
}
"""Options that the sources of this file require, and those that they do not have, by kind."""


@dataclass(frozen=True)
class DataConfig:
    """Training samples: a mixture of sources, and the worker processes that decode them (0: in the main process).

    For a tokenizer that takes any size, one of two says which: image_size (height, width) for all samples, or buckets
    of sizes by the images' own shapes.
    """

    sources: tuple[SourceConfig, ...] = field(default_factory=lambda: (SourceConfig("photographs"),))
    workers: Annotated[int, Range(0, 1024)] = 0
    image_size: tuple[Annotated[int, Range(1)], Annotated[int, Range(1)]] | None = None
    buckets: BucketConfig | None = None

    def check(self) -> None:
        """Refuse different weights of stored sources with buckets, which show each of their images once in a pass."""
        stored = {source.weight for source in self.sources if BUILT_IN.get(source.kind, ((), ()))[0]}
        even = self.buckets is None or len(stored) < 2
        require(even, "sources", "one weight of all stored sources, with buckets", sorted(stored))

    def require_captions(self, where: str) -> None:
        """Refuse a mixture in which no image has a caption; shards and Parquet files are not looked into."""
        captioned = any(
            source.kind not in ("photographs", "text", "folder")
            or (source.kind == "folder" and any(p.with_suffix(".txt").is_file() for p in list_images(source.path)))
            for source in self.sources
        )
        expected = "images with captions (scenes, or a folder, shards or Parquet files with texts)"
        require(captioned, f"{where}.sources", expected, "none")


@dataclass(frozen=True)
class Batch:
    """`images` float [B, 3, H, W] in [-1, 1], their captions ("" for none), and what was skipped and why."""

    images: Tensor
    captions: list[str]
    skipped: list[str]

    def pin_memory(self) -> "Batch":
        """For the loader's pinning thread."""
        return Batch(self.images.pin_memory(), self.captions, self.skipped)


class Endless:
    """Common base of all sources without end: images of any shape, as they are asked for."""

    size, augmented = None, True

    def shape(self, index: int) -> tuple[int, int]:
        """A shape that the index decides: aspect ratios from 1:2 to 2:1, evenly on a logarithmic scale."""
        half = 0.5 * (mix_seeds(index, 3) / 2**64 * 2 - 1)
        return round(1024 * 2**-half), round(1024 * 2**half)

    def name(self, index: int) -> str:
        return f"{type(self).__name__.lower()} {index}"

    def locate(self, position: int, seed: int) -> int:
        """The position itself."""
        return position


class Scenes(Endless):
    """Rendered scenes with captions, without end."""

    augmented = False

    def __init__(self, config: SourceConfig) -> None:
        """Every scene is as good as another: there is nothing to configure."""

    def sample(self, index: int, image_size: tuple[int, int], rng: random.Random) -> Sample:
        scene = make_scene(rng.getrandbits(40))
        height, width = image_size
        return Sample(scene.render(max(height, width)).resize((width, height)), scene.caption)


class Photographs(Endless):
    """Random patches of the built-in photographs, without end."""

    def __init__(self, config: SourceConfig) -> None:
        low, high = self.zoom = config.zoom
        require(low <= high, "data.sources.zoom", "two numbers in order", config.zoom)

    def sample(self, index: int, image_size: tuple[int, int], rng: random.Random) -> Sample:
        image = rng.choice(list(photographs("train").values()))
        return Sample(random_patch(image, image_size, rng, self.zoom), "")


class Text(Endless):
    """Rendered words, without end."""

    def __init__(self, config: SourceConfig) -> None:
        """There is nothing to configure."""

    def sample(self, index: int, image_size: tuple[int, int], rng: random.Random) -> Sample:
        return Sample(text_image(rng, image_size), "")


class Stored:
    """Images of a set, each cut at random."""

    augmented = True

    def __init__(self, images: ImageSet) -> None:
        self.images = images
        self.size = len(images)

    def sample(self, index: int, image_size: tuple[int, int], rng: random.Random) -> Sample:
        image, caption, skipped = self.images.read(index)
        height, width = image_size
        cut = random_crop(image, height, rng) if height == width else random_cut(image, image_size, rng)
        return Sample(cut, caption, skipped)

    def name(self, index: int) -> str:
        return self.images.name(index)

    def shape(self, index: int) -> tuple[int, int]:
        return self.images.shape(index)

    def locate(self, position: int, seed: int) -> int:
        found = self.images.order(position, seed)
        return shuffled(position, self.size, seed) if found is None else found


class Folder(Stored):
    """Image files below a folder."""

    def __init__(self, config: SourceConfig) -> None:
        super().__init__(ImageFiles(FileList.below(config.path)))


class ShardFolder(Stored):
    """Images in tar files below a folder."""

    def __init__(self, config: SourceConfig) -> None:
        super().__init__(Shards(config.path))


class ParquetFolder(Stored):
    """Images in Parquet files below a folder."""

    def __init__(self, config: SourceConfig) -> None:
        super().__init__(ParquetImages(FileList.below(config.path, (".parquet",)), Path(config.path)))


SOURCES |= {
    "photographs": Photographs,
    "scenes": Scenes,
    "text": Text,
    "folder": Folder,
    "shards": ShardFolder,
    "parquet": ParquetFolder,
}


class Mixture(Dataset[dict[str, Any]]):
    """Samples by position. What cannot be read is replaced by the next sample of its source, and reported.

    A position reports its own sample alone and not what its replacement passed over, so that a pass reports each once.
    """

    def __init__(self, config: DataConfig, image_size: tuple[int, int], seed: int) -> None:
        require(len(config.sources) > 0, "data.sources", "at least one source", "none")
        self.config, self.image_size, self.seed, self.workers = config, image_size, seed, config.workers
        self.sources: list[Source] = [SOURCES[source.kind](source) for source in config.sources]
        self.interleaving = Interleaving([source.weight for source in config.sources])

    def locate(self, position: int, offset: int = 0) -> tuple[int, int]:
        """Number of the source and index in it; `offset` samples further on in the same source."""
        number, place = self.interleaving(position)
        return number, self.sources[number].locate(place + offset, mix_seeds(self.seed, number) >> 1)

    def __getitem__(self, position: int) -> dict[str, Any]:
        skipped: Sequence[str] = ()
        for offset in range(MAX_UNREADABLE):
            number, index = self.locate(position, offset)
            source, rng = self.sources[number], random.Random(mix_seeds(self.seed, position, offset))
            if source.size is not None and offset >= source.size:
                break
            try:
                image, caption, also = source.sample(index, self.image_size, rng)
            except ValueError as error:
                skipped = skipped or [str(error)]
                continue
            if source.augmented:
                image = augmented(image, self.config.sources[number].augmentation, rng)
            return {"image": image_to_tensor(image), "caption": caption, "skipped": list(skipped or also)}
        fail("data.path", "a source with at least one readable image", next(iter(skipped)))


class Positions(Sampler[list[int]]):
    """Endless batches of positions for one of `world` ranks, beginning at position `start` of all ranks together.

    The ranks take turns, a batch each, so the samples of a step are the same however they are shared out.
    """

    def __init__(self, batch_size: int, start: int = 0, rank: int = 0, world: int = 1) -> None:
        self.batch_size, self.start, self.rank, self.world = batch_size, start, rank, world

    def __iter__(self) -> Iterator[list[int]]:
        first = self.start + self.rank * self.batch_size
        while True:
            yield list(range(first, first + self.batch_size))
            first += self.world * self.batch_size


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
        worker_init_fn=_leave_signals,
    )


def _leave_signals(worker: int) -> None:
    """Workers go on at signals that are sent to all processes of a run: the main process ends them when it has saved.

    The second SIGTERM acts: a loader sends it to workers that do not end by themselves.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: signal.signal(signal.SIGTERM, signal.SIG_DFL))


def collate(samples: Sequence[dict[str, Any]]) -> Batch:
    """Samples to one batch."""
    return Batch(
        torch.stack([sample["image"] for sample in samples]),
        [sample["caption"] for sample in samples],
        [name for sample in samples for name in sample["skipped"]],
    )
