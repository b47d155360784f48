"""Buckets of sizes: every picture in every pass, a new order each time, nothing transposed, resumable."""

from collections import Counter
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from tokenizers_mm._images import read_size
from tokenizers_mm.data.buckets import AnySize, BucketBatches, BucketConfig, Draw, bucket_size
from tokenizers_mm.data.image_sets import ImageFiles, Source
from tokenizers_mm.data.sources import Stored, collate, list_images

SHAPES = [(300, 400), (400, 300), (310, 410), (64, 64), (20, 50), (700, 900), (305, 402), (410, 306)]


def stored(files: list[Path]) -> list[Source]:
    return [Stored(ImageFiles(files, files[0].parent))]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pictures with a gradient from top (dark) to bottom (bright)."""
    place = tmp_path_factory.mktemp("pictures")
    for index, (height, width) in enumerate(SHAPES):
        ramp = np.linspace(0, 255, height).astype(np.uint8)[:, None, None]
        Image.fromarray(np.broadcast_to(ramp, (height, width, 3)).copy()).save(place / f"{index}.png")
    return place


def test_sizes_keep_the_shape_and_the_bounds() -> None:
    config = BucketConfig()
    for height, width in [*SHAPES, (2000, 3000), (5000, 400)]:
        rows, columns = bucket_size(height, width, config)
        assert rows % 16 == columns % 16 == 0
        assert rows % 64 == 0 or rows < 64
        assert rows * columns <= 512**2
        assert (rows > columns) == (height > width) or rows == columns
        assert bucket_size(width, height, config) == (columns, rows)
    assert bucket_size(2000, 3000, config) == (384, 576)


def test_every_pass_sees_every_picture_in_a_new_order() -> None:
    sizes = [bucket_size(*shape, BucketConfig()) for shape in SHAPES * 4]
    batches = BucketBatches(sizes, batch_size=3, seed=7)
    orders = [batches.one_pass(epoch) for epoch in range(4)]
    for order in orders:
        assert all(len(batch) == 3 and len({draw.size for draw in batch}) == 1 for batch in order)
        assert {draw.index for batch in order for draw in batch} == set(range(len(sizes)))
        assert all(draw.size == sizes[draw.index] for batch in order for draw in batch)
    composition = [Counter(frozenset(d.index for d in batch) for batch in order) for order in orders]
    assert len({tuple(d.index for batch in order for d in batch) for order in orders}) == 4
    assert all(composition[0] != other for other in composition[1:])  # batches are put together anew


def test_resuming_and_ranks_share_one_sequence() -> None:
    sizes = [bucket_size(*shape, BucketConfig()) for shape in SHAPES]
    whole = list(islice(BucketBatches(sizes, 2, seed=1), 24))
    assert list(islice(BucketBatches(sizes, 2, seed=1, start_step=9), 15)) == whole[9:]
    for rank in range(3):
        assert list(islice(BucketBatches(sizes, 2, seed=1, rank=rank, world=3), 8)) == whole[rank::3]


def test_pictures_are_never_transposed(folder: Path) -> None:
    dataset = AnySize(stored(list_images(folder)), BucketConfig())
    batches = BucketBatches(dataset.sizes, 2, seed=0).one_pass(0)
    for draws in batches:
        images = collate([dataset[draw] for draw in draws]).images
        assert tuple(images.shape[2:]) == draws[0].size
        rows = images.mean((1, 3))
        assert bool((rows[:, -1] > rows[:, 0]).all())  # dark is still on top
        assert float((images.mean((1, 2)).amax(-1) - images.mean((1, 2)).amin(-1)).max()) < 0.01
    assert torch.equal(dataset[batches[0][0]]["image"], dataset[batches[0][0]]["image"])


def test_what_cannot_be_read_is_replaced_and_reported(folder: Path, tmp_path: Path) -> None:
    bad, good = tmp_path / "a.png", tmp_path / "b.png"
    bad.write_bytes(b"nothing")
    good.write_bytes((folder / "0.png").read_bytes())
    late = tmp_path / "c.png"
    data = (folder / "1.png").read_bytes()
    late.write_bytes(data[: len(data) // 2])  # the header is whole, the picture is not
    dataset = AnySize(stored([bad, good, late]), BucketConfig())
    assert [dataset.name(index) for index in range(len(dataset))] == ["b.png", "c.png"]
    assert "a.png: expected a readable image" in dataset.skipped[0]
    sample = dataset[Draw(1, (64, 64), 0)]
    assert sample["image"].shape == (3, 64, 64)
    assert "c.png" in sample["skipped"][0]
    with pytest.raises(ValueError, match="at least one readable image"):
        AnySize(stored([bad]), BucketConfig())


def test_turned_pictures_and_bad_configurations(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (30, 20)).save(tmp_path / "a.jpg", exif=exif)
    assert read_size(tmp_path / "a.jpg") == (30, 20)
    with pytest.raises(ValueError, match="a multiple of 16, got 40"):
        BucketConfig(step=40)
    with pytest.raises(ValueError, match="1 to 64, got 128"):
        BucketConfig(min_pixels=128, max_pixels=64)
