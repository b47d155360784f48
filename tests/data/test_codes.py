"""Files of codes: what is written comes back, and a mutated file is one sentence that names it."""

import random
import warnings
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from tokenizers_mm.data.codes import CodesOfImage, read_codes, write_codes
from tokenizers_mm.types import ImageCodes, ImageLatents, Stream

ENDINGS = [
    ".safetensors",
    ".npz",
    pytest.param(".parquet", marks=pytest.mark.skipif(find_spec("pyarrow") is None, reason="pyarrow is not installed")),
]
SIZES = ([(16, 16), (16, 16)], [(16, 16), (32, 16), (8, 64)])


def streams(height: int, width: int) -> tuple[Stream, ...]:
    return (Stream("pixel", 8, ((height // 8, width // 8),)),)


def codes(sizes: list[tuple[int, int]]) -> list[ImageCodes]:
    generator = torch.Generator().manual_seed(0)
    return [ImageCodes(torch.randint(8, (1, h * w // 64), generator=generator), h, w, streams(h, w)) for h, w in sizes]


@pytest.mark.parametrize("ending", ENDINGS)
@pytest.mark.parametrize("sizes", SIZES)
def test_codes_and_latents_come_back(tmp_path: Path, ending: str, sizes: list[tuple[int, int]]) -> None:
    path = tmp_path / f"x{ending}"
    ids = codes(sizes)
    items = [CodesOfImage.of(each, f"{index}.png", f"é {index}") for index, each in enumerate(ids)]
    write_codes(path, items, "some")
    for index, (item, expected) in enumerate(zip(read_codes(path), ids, strict=True)):
        assert (item.name, item.caption) == (f"{index}.png", f"é {index}")
        found = item.codes(streams)
        assert isinstance(found, ImageCodes)
        assert torch.equal(found.ids, expected.ids)
        assert (found.height, found.width) == (expected.height, expected.width)
    latents = [ImageLatents(torch.randn(1, h * w // 64, 5), h, w, (h // 8, w // 8)) for h, w in sizes]
    write_codes(path, [CodesOfImage.of(each) for each in latents], "some")
    for item, wanted in zip(read_codes(path), latents, strict=True):
        back = item.codes(lambda *_: ())
        assert isinstance(back, ImageLatents)
        assert torch.equal(back.values, wanted.values)
        assert back.grid == wanted.grid


@pytest.mark.parametrize("ending", ENDINGS)
@pytest.mark.parametrize("sizes", SIZES)
def test_mutated_files_are_one_sentence(tmp_path: Path, ending: str, sizes: list[tuple[int, int]]) -> None:
    path, rng, refused = tmp_path / f"x{ending}", random.Random(ending), 0
    write_codes(path, [CodesOfImage.of(each, "a") for each in codes(sizes)], "some")
    whole = path.read_bytes()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(250):
            data = bytearray(whole)
            first = rng.randrange(len(data))
            for _ in range(rng.randint(1, 6)):
                data[min(len(data) - 1, abs(first + rng.randint(-30, 30)))] = rng.randrange(256)
            path.write_bytes(data if rng.random() < 0.9 else data[: rng.randrange(len(data))])
            message = "ids"
            try:
                for item in read_codes(path):
                    item.codes(streams)
            except ValueError as error:
                message, refused = str(error), refused + 1
            assert message.startswith(("ids", str(path), "size"))
            assert len(message) < 700
            assert "\n" not in message
    assert refused > 100
