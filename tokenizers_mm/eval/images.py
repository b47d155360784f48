"""Sources of images for evaluation: a folder, tar shards, crops of photographs that packages carry, rendered scenes."""

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar, cast

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from tokenizers_mm._images import image_levels
from tokenizers_mm.data.files import FileList
from tokenizers_mm.data.image_sets import ImageFiles, Sample, digest
from tokenizers_mm.data.photographs import fixed_crops
from tokenizers_mm.data.scenes import make_scene
from tokenizers_mm.data.shards import Shards

PHOTOGRAPHS = "photographs"
"""Name of a built-in source: crops of held-out photographs."""

SCENES = "scenes"
"""Name of a built-in source: held-out rendered scenes; the class is colour and shape of the largest object."""

Item = TypeVar("Item")

COUNTS = {PHOTOGRAPHS: 96, SCENES: 256}
"""Images of the built-in sources."""


@dataclass(frozen=True)
class ImageSource:
    """Images by index. names: of each, relative to `place`. read: an image with its caption, by index.

    classes: names of classes, by default the folders that images stand in where there are several. labels: index of
    the class of each image, -1 for none. marks: a digest of sizes and times of the files, by which an unfinished run
    knows that they are the same.
    """

    place: str
    names: list[str]
    read: Callable[[int], Sample]
    labels: list[int]
    classes: list[str] = field(default_factory=list)
    marks: str = ""

    def __len__(self) -> int:
        return len(self.names)

    @classmethod
    def at(cls, place: str, limit: int | None = None, crop: int = 256) -> "ImageSource":
        """The first `limit` images of a folder of images or of tar files, of `photographs` or of `scenes`.

        A text file of the same name beside an image is its caption. crop: side of the images of the built-in sources.
        """
        if place in COUNTS and not Path(place).exists():
            names = [f"{i:03d}" for i in range(limit or COUNTS[place])]
            if place == SCENES:
                return cls._scenes(names, crop)
            crops = fixed_crops("heldout", len(names), crop)
            return cls(place, names, lambda index: Sample(crops[index], ""), [-1] * len(names))
        if Path(place).is_dir() and next(Path(place).rglob("*.tar"), None) is not None:
            shards = Shards(place)
            count = min(len(shards), limit or len(shards))
            names = [shards.name(index) for index in range(count)]
            return cls(place, names, shards.read, [-1] * count, marks=shards.fingerprint())
        files = FileList.below(place)
        count = min(len(files), limit or len(files))
        names = [str(files[index].relative_to(place)) for index in range(count)]
        folders = [str(Path(name).parent) for name in names]
        classes = sorted(set(folders)) if len(set(folders)) > 1 else []
        numbers = {folder: number for number, folder in enumerate(classes)}
        labels = [numbers.get(folder, -1) for folder in folders]
        marks = digest(_mark(files[index]) for index in range(count))
        return cls(place, names, ImageFiles(files).read, labels, classes, marks)

    @classmethod
    def _scenes(cls, names: list[str], side: int) -> "ImageSource":
        """Held-out scenes, the seeds of their numbers."""
        scenes = [make_scene(index, "heldout") for index in range(len(names))]
        found = [f"{scene.objects[0].colour} {scene.objects[0].shape}" for scene in scenes]
        classes = sorted(set(found))
        labels = [classes.index(name) for name in found]
        return cls(SCENES, names, lambda i: Sample(scenes[i].render(side), scenes[i].caption), labels, classes)


def _mark(path: Path) -> str:
    """Size and time of a file; nothing for one that is gone."""
    try:
        found = path.stat()
    except OSError:
        return ""
    return f"{found.st_size} {found.st_mtime_ns}"


@dataclass(frozen=True)
class Loaded:
    """Consecutive images of one size. images: [B, 3, H, W] in [-1, 1]. captions: of each, "" for none.

    levels: uint8 [B, 3, H, W], from which `images` were made.

    skipped: errors of images that were left out, and of captions.

    following: index of the first image that is in no batch yet.
    """

    indices: list[int]
    images: Tensor
    levels: np.ndarray
    captions: list[str]
    skipped: list[str]
    following: int


def batches(
    source: ImageSource, prepare: Callable[[Image.Image, str], Image.Image], pixels: int, start: int = 0
) -> Iterator[Loaded]:
    """Images from an index on, in batches; the last one may hold no images, but what was skipped.

    prepare: makes an image ready, by image and name; a ValueError leaves it out. pixels: of a batch, or one image.
    """
    indices: list[int] = []
    waiting: list[np.ndarray] = []
    captions: list[str] = []
    skipped: list[str] = []

    def made(following: int) -> Loaded:
        levels = np.stack(waiting) if waiting else np.zeros((0, 3, 1, 1), dtype=np.uint8)
        images = torch.from_numpy(levels).float().div_(127.5).sub_(1)
        return Loaded(indices, images, levels, captions, skipped, following)

    for index in range(start, len(source)):
        try:
            sample = source.read(index)
            image = prepare(sample.image, source.names[index])
            levels = np.ascontiguousarray(image_levels(image).transpose(2, 0, 1))
        except ValueError as error:
            skipped.append(str(error))
            continue
        full = (len(waiting) + 1) * levels[0].size > pixels
        if waiting and (full or waiting[0].shape != levels.shape):
            yield made(index)
            indices, waiting, captions, skipped = [], [], [], []
        indices.append(index)
        waiting.append(levels)
        captions.append(sample.caption)
        skipped += sample.skipped
    if waiting or skipped:
        yield made(len(source))


def ahead(items: Iterator[Item]) -> Iterator[Item]:
    """The same items, the next one made by another thread while one is in use."""
    end = object()
    with ThreadPoolExecutor(1) as pool:
        pending = pool.submit(next, items, end)
        while (item := pending.result()) is not end:
            pending = pool.submit(next, items, end)
            yield cast(Item, item)
