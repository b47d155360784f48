"""Sources of images for evaluation: a folder, tar shards, or crops of the photographs that packages carry."""

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar, cast

import torch
from PIL import Image
from torch import Tensor

from tokenizers_mm._images import image_to_tensor, read_image
from tokenizers_mm.data.files import FileList
from tokenizers_mm.data.photographs import fixed_crops
from tokenizers_mm.data.shards import Shards

PHOTOGRAPHS = "photographs"
"""Name of the built-in source: crops of held-out photographs."""

Item = TypeVar("Item")

CROPS = 96
"""Crops of the built-in source."""


@dataclass(frozen=True)
class ImageSource:
    """Images by index. names: of each, relative to `place`. labels: class by folder, -1 where there are no classes."""

    place: str
    names: list[str]
    open: Callable[[int], Image.Image]
    labels: list[int]

    def __len__(self) -> int:
        return len(self.names)

    @classmethod
    def at(cls, place: str, limit: int | None = None, crop: int = 256) -> "ImageSource":
        """The first `limit` images of a folder of images or of tar files, or of `photographs`.

        crop: side of the crops of `photographs`.
        """
        if place == PHOTOGRAPHS and not Path(place).exists():
            crops = fixed_crops("heldout", limit or CROPS, crop)
            return cls(place, [f"{i:03d}" for i in range(len(crops))], crops.__getitem__, [-1] * len(crops))
        if Path(place).is_dir() and next(Path(place).rglob("*.tar"), None) is not None:
            shards = Shards(place)
            count = min(len(shards), limit or len(shards))
            names = [shards.name(index) for index in range(count)]
            return cls(place, names, lambda index: shards.read(index).image, [-1] * count)
        files = FileList.below(place)
        count = min(len(files), limit or len(files))
        names = [str(files[index].relative_to(place)) for index in range(count)]
        folders = [str(Path(name).parent) for name in names]
        classes = {folder: number for number, folder in enumerate(sorted(set(folders)))}
        labels = [classes[folder] if len(classes) > 1 else -1 for folder in folders]
        return cls(place, names, lambda index: read_image(files[index]), labels)


@dataclass(frozen=True)
class Loaded:
    """Consecutive images of one size. images: [B, 3, H, W] in [-1, 1]. skipped: errors of images that were left out.

    following: index of the first image that is in no batch yet.
    """

    indices: list[int]
    images: Tensor
    skipped: list[str]
    following: int


def batches(
    source: ImageSource, prepare: Callable[[Image.Image, str], Image.Image], pixels: int, start: int = 0
) -> Iterator[Loaded]:
    """Images from an index on, in batches; the last one may hold no images, but what was skipped.

    prepare: makes an image ready, by image and name; a ValueError leaves it out. pixels: of a batch, or one image.
    """
    indices: list[int] = []
    waiting: list[Tensor] = []
    skipped: list[str] = []
    for index in range(start, len(source)):
        try:
            x = image_to_tensor(prepare(source.open(index), source.names[index]))
        except ValueError as error:
            skipped.append(str(error))
            continue
        full = (len(waiting) + 1) * x[0].numel() > pixels
        if waiting and (full or waiting[0].shape != x.shape):
            yield Loaded(indices, torch.stack(waiting), skipped, index)
            indices, waiting, skipped = [], [], []
        indices.append(index)
        waiting.append(x)
    if waiting or skipped:
        yield Loaded(indices, torch.stack(waiting) if waiting else torch.zeros(0, 3, 1, 1), skipped, len(source))


def ahead(items: Iterator[Item]) -> Iterator[Item]:
    """The same items, the next one made by another thread while one is in use."""
    end = object()
    with ThreadPoolExecutor(1) as pool:
        pending = pool.submit(next, items, end)
        while (item := pending.result()) is not end:
            pending = pool.submit(next, items, end)
            yield cast(Item, item)
