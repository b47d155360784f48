"""`tokenizers-mm decode`."""

import argparse
import unicodedata
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tokenizers_mm._check import fail
from tokenizers_mm.cli.options import counted, load_tokenizer, tokenizer_option

SUMMARY = "Ids to images."


def add_arguments(command: argparse.ArgumentParser) -> None:
    """Add the arguments of the verb."""
    command.add_argument("ids", type=Path, help="a file or a folder of shards that `encode` or `tokenize` wrote")
    tokenizer_option(command)
    command.add_argument(
        "--out-dir", "--out", type=Path, default=Path("decoded"), help="folder of the images (default: %(default)s)"
    )
    command.add_argument("--any-tokenizer", action="store_true", help="decode ids that another tokenizer made, too")


def run(options: argparse.Namespace) -> None:
    """Decode ids into a folder of PNG files with the names of the images, a few at a time."""
    import torch

    from tokenizers_mm._files import folder_place
    from tokenizers_mm._images import tensor_to_images
    from tokenizers_mm._origin import OriginCheck
    from tokenizers_mm.data.codes import CodesOfImage
    from tokenizers_mm.data.token_shards import read_shards
    from tokenizers_mm.eval.pictures import save_picture
    from tokenizers_mm.models.base import BATCH_PIXELS
    from tokenizers_mm.types import join_codes

    folder_place(options.out_dir)
    rows = read_shards(options.ids)
    first = next(rows, None)
    tokenizer = load_tokenizer(options)
    check_origin = OriginCheck(tokenizer, options.any_tokenizer)
    limit = BATCH_PIXELS.get(tokenizer.device.type, BATCH_PIXELS["cuda"])
    names = Names(options.out_dir)
    done = 0

    def write(batch: list[Any]) -> None:
        codes = join_codes([item.codes(tokenizer.streams) for item in batch])
        with torch.no_grad():
            images = tokenizer.decode(codes.to(tokenizer.device))
        for item, image in zip(batch, tensor_to_images(images), strict=True):
            save_picture(image, names(item.name))

    waiting: list[Any] = []
    for item in _chained(first, rows):
        if not isinstance(item, CodesOfImage):
            fail("ids", "ids of images", f"records in {options.ids}")
        check_origin(str(options.ids), item.origin)
        continuous = not tokenizer.streams(item.height, item.width)
        if continuous != (item.grid is not None):
            kind = "latents" if continuous else "ids"
            fail("ids", f"{kind}, which a {tokenizer.family} tokenizer decodes", f"the other kind in {options.ids}")
        most = max(1, limit // (item.height * item.width))
        if waiting and (len(waiting) == most or not item.is_like(waiting[0])):
            write(waiting)
            waiting = []
        waiting.append(item)
        done += 1
    if waiting:
        write(waiting)
    print(f"{options.out_dir}: {counted(done)}")


def _chained(first: Any, rest: Iterator[Any]) -> Iterator[Any]:
    if first is not None:
        yield first
        yield from rest


class Names:
    """Paths of PNG files in a folder by the names of images: no name leads out of it, and no two are equal.

    No file has the name of a folder that another one needs.
    """

    def __init__(self, folder: Path) -> None:
        self.folder, self.count = folder, 0
        self.taken: set[str] = set()
        self.folders: set[str] = set()

    def __call__(self, name: str) -> Path:
        """The path for the next image; one without a name, or with a bad one, is called by its number."""
        parts = [part for part in name.replace("\\", "/").split("/") if part not in ("", ".", "..")]
        parts = [part if not part.startswith(".") else f"_{part}" for part in parts]
        usable = bool(parts) and name.isprintable() and all(len(part.encode()) <= 200 for part in parts)
        usable = usable and len("/".join(parts).encode()) <= 1000
        stem = "/".join([*parts[:-1], Path(parts[-1]).stem]) if usable and len(parts) <= 32 else f"{self.count:05d}"
        if _folders(stem) & self.taken:  # a file stands where a folder would
            stem = stem.replace("/", "_")
        chosen = stem
        while any(f"{_key(chosen)}.png" in names for names in (self.taken, self.folders)):
            chosen = f"{stem}_{self.count:05d}"
            stem += "_"
        self.taken.add(f"{_key(chosen)}.png")
        self.folders |= _folders(chosen)
        self.count += 1
        return self.folder / f"{chosen}.png"


def _key(stem: str) -> str:
    """One text for all names that some file system, which folds case or composes accents, takes for one."""
    return unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", stem).casefold())


def _folders(stem: str) -> set[str]:
    """The folders that a path needs, by their keys."""
    return {_key(str(parent)) for parent in Path(stem).parents} - {"."}
