"""Stored images by index: files, tar shards and Parquet files behind one protocol, with names and captions."""

import os
import random
from collections.abc import Iterator, Sequence
from hashlib import sha256
from pathlib import Path
from typing import NamedTuple, Protocol

from PIL import Image

from tokenizers_mm._images import read_image, read_size
from tokenizers_mm.data.captions import read_caption
from tokenizers_mm.data.files import FileList


class Sample(NamedTuple):
    """An image, its caption ("" for none), and sentences about what was left out."""

    image: Image.Image
    caption: str
    skipped: Sequence[str] = ()


class ImageSet(Protocol):
    """Images by index. An index that cannot be read is a ValueError that names it."""

    def __len__(self) -> int: ...

    def name(self, index: int) -> str:
        """Text that tells the image from the others: a relative path with "/", or as close to one as there is."""
        ...

    def read(self, index: int) -> Sample:
        """The image, upright RGB."""
        ...

    def shape(self, index: int) -> tuple[int, int]:
        """Height and width, from the header of the image."""
        ...

    def order(self, position: int, seed: int) -> int | None:
        """Index at a position of endless passes, where the set has an order that is faster than a random one."""
        ...

    def fingerprint(self) -> str:
        """A digest of what the set is: other names or files give another one."""
        ...


class Source(Protocol):
    """Samples by index; an index that cannot be read is a ValueError that names it.

    size: how many there are, None for an endless source, whose index is the position itself. augmented: whether
    samples are mirrored and coloured at random.
    """

    @property
    def size(self) -> int | None: ...

    @property
    def augmented(self) -> bool: ...

    def sample(self, index: int, image_size: tuple[int, int], rng: random.Random) -> Sample:
        """The sample of an index, cut to (height, width), before augmentation."""
        ...

    def name(self, index: int) -> str:
        """Text that tells the sample of an index from the others."""
        ...

    def shape(self, index: int) -> tuple[int, int]:
        """Height and width of the stored image of an index; of an endless source, a shape to draw it in."""
        ...

    def locate(self, position: int, seed: int) -> int:
        """Index at a position of passes without end, each sample once in a pass."""
        ...


class ImageFiles:
    """Image files; a text file of the same name beside an image is its caption."""

    def __init__(self, files: FileList | Sequence[Path], root: Path | None = None) -> None:
        """root: what names are relative to (default: that of a `FileList`, else names are those of the files)."""
        self.files = files
        self.root = files.root if root is None and isinstance(files, FileList) else root

    def __len__(self) -> int:
        return len(self.files)

    def name(self, index: int) -> str:
        if isinstance(self.files, FileList) and self.root == self.files.root:
            return self.files.name(index).replace(os.sep, "/")
        path = self.files[index]
        return (path if self.root is None else path.relative_to(self.root)).as_posix()

    def read(self, index: int) -> Sample:
        path, skipped = self.files[index], []
        return Sample(read_image(path), read_caption(path, skipped), skipped)

    def shape(self, index: int) -> tuple[int, int]:
        return read_size(self.files[index])

    def order(self, position: int, seed: int) -> int | None:
        return None

    def fingerprint(self) -> str:
        return digest(self.name(index) for index in range(len(self)))


class Joined:
    """Several sets as one, one after the other. names: what the names of each begin with, such as "a/"."""

    def __init__(self, sets: Sequence[ImageSet], names: Sequence[str]) -> None:
        self.sets, self.names = sets, names
        self.ends = [sum(len(part) for part in sets[: number + 1]) for number in range(len(sets))]

    def __len__(self) -> int:
        return self.ends[-1]

    def _find(self, index: int) -> tuple[int, int]:
        number = next(number for number, end in enumerate(self.ends) if index < end)
        return number, index - (self.ends[number] - len(self.sets[number]))

    def name(self, index: int) -> str:
        number, place = self._find(index)
        return self.names[number] + self.sets[number].name(place)

    def read(self, index: int) -> Sample:
        number, place = self._find(index)
        return self.sets[number].read(place)

    def shape(self, index: int) -> tuple[int, int]:
        number, place = self._find(index)
        return self.sets[number].shape(place)

    def order(self, position: int, seed: int) -> int | None:
        return None

    def fingerprint(self) -> str:
        return digest(name + part.fingerprint() for name, part in zip(self.names, self.sets, strict=True))


def digest(texts: Iterator[str]) -> str:
    """A digest of a sequence of texts."""
    found = sha256()
    for text in texts:
        found.update(text.encode("utf-8", errors="surrogateescape") + b"\0")
    return found.hexdigest()
