"""Sources of images for evaluation: a folder, tar shards, or crops of the photographs that packages carry."""

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from tokenizers_mm._check import require
from tokenizers_mm._images import image_to_tensor, read_image
from tokenizers_mm.data.files import FileList
from tokenizers_mm.data.photographs import fixed_crops
from tokenizers_mm.data.shards import Shards

PHOTOGRAPHS = "photographs"
"""Name of the built-in source: crops of held-out photographs."""

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
            names = [f"{number}:{start}" for number, start in shards.places[:count, :2].tolist()]
            return cls(place, names, lambda index: shards[index][0], [-1] * count)
        files = FileList.below(place)
        count = min(len(files), limit or len(files))
        names = [str(files[index].relative_to(place)) for index in range(count)]
        folders = [str(Path(name).parent) for name in names]
        classes = {folder: number for number, folder in enumerate(sorted(set(folders)))}
        labels = [classes[folder] if len(classes) > 1 else -1 for folder in folders]
        return cls(place, names, lambda index: read_image(files[index]), labels)


def batches(
    source: ImageSource,
    prepare: Callable[[Image.Image, str], Image.Image],
    pixels: int,
    start: int = 0,
    refused: Callable[[str], None] | None = None,
) -> Iterator[tuple[list[int], Tensor, int]]:
    """Batches of consecutive images of one size: (indices, [B, 3, H, W] in [-1, 1], index after the batch).

    prepare: makes an image ready, by image and name. pixels: of one batch, at least one image. refused: called with the
    error of an image that cannot be used; raised where it is None.
    """
    indices: list[int] = []
    waiting: list[Tensor] = []
    for index in itertools.count(start):
        if index >= len(source):
            break
        try:
            image = prepare(source.open(index), source.names[index])
        except ValueError as error:
            if refused is None:
                raise
            refused(str(error))
            continue
        x = image_to_tensor(image)
        full = sum(t[0].numel() for t in waiting) + x[0].numel() > pixels
        if waiting and (full or waiting[0].shape != x.shape):
            yield indices, torch.stack(waiting), index
            indices, waiting = [], []
        indices.append(index)
        waiting.append(x)
    if waiting:
        yield indices, torch.stack(waiting), len(source)


def only(source: ImageSource, indices: list[int]) -> ImageSource:
    """The images with some indices, in that order."""
    require(len(indices) > 0, "images", "at least one", "none")
    names, labels = ([values[i] for i in indices] for values in (source.names, source.labels))
    return ImageSource(source.place, names, lambda index: source.open(indices[index]), labels)  # type: ignore[arg-type]
