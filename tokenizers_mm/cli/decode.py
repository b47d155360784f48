"""`tokenizers-mm decode`."""

import argparse
import itertools
from pathlib import Path
from typing import Any

from tokenizers_mm._check import fail
from tokenizers_mm.cli.options import load_tokenizer, tokenizer_option

SUMMARY = "Ids to images."


def add_arguments(command: argparse.ArgumentParser) -> None:
    """Add the arguments of the verb."""
    command.add_argument("ids", type=Path, help="a file that `encode` wrote")
    tokenizer_option(command)
    command.add_argument("--out-dir", type=Path, default=Path("decoded"), help="folder (default: %(default)s)")


def run(options: argparse.Namespace) -> None:
    """Decode a file of ids into a folder of PNG files."""
    import torch

    from tokenizers_mm._images import tensor_to_images
    from tokenizers_mm.data.codes import read_codes
    from tokenizers_mm.eval.pictures import save_picture
    from tokenizers_mm.models.base import BATCH_PIXELS
    from tokenizers_mm.types import join_codes

    items = list(read_codes(options.ids))
    tokenizer = load_tokenizer(options)
    limit = BATCH_PIXELS.get(tokenizer.device.type, BATCH_PIXELS["cuda"])
    done = 0
    while done < len(items):
        first = items[done]
        continuous = not tokenizer.streams(first.height, first.width)
        if continuous != (first.grid is not None):
            kind = "latents" if continuous else "ids"
            fail("ids", f"{kind}, which a {tokenizer.family} tokenizer decodes", f"the other kind in {options.ids}")
        most = max(1, limit // (first.height * first.width))
        alike: list[Any] = list(itertools.takewhile(first.is_like, items[done : done + most]))
        codes = join_codes([item.codes(tokenizer.streams) for item in alike])
        with torch.no_grad():
            images = tokenizer.decode(codes.to(tokenizer.device))
        for index, image in enumerate(tensor_to_images(images), done):
            save_picture(image, options.out_dir / f"{index:05d}.png")
        done += len(alike)
    print(f"{options.out_dir}: {done} images")
