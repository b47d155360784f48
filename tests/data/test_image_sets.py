"""Stored images behind one protocol: files, tar shards and Parquet; mixtures and buckets of every source."""

import io
import pickle
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from tests.data.test_order import make_shard
from tokenizers_mm.data.buckets import ENDLESS_PASS, AnySize, BucketBatches, BucketConfig
from tokenizers_mm.data.open_images import open_image_set
from tokenizers_mm.data.parquet import WINDOW, ParquetImages
from tokenizers_mm.data.sources import SOURCES, DataConfig, Mixture, SourceConfig, collate

needs_arrow = pytest.mark.skipif(find_spec("pyarrow") is None, reason="pyarrow is not installed")


def png(value: int, size: tuple[int, int] = (40, 40)) -> bytes:
    stream = io.BytesIO()
    Image.new("RGB", (size[1], size[0]), (value, 0, 0)).save(stream, "PNG")
    return stream.getvalue()


def write(path: Path, columns: dict[str, list[Any]], group: int = 4) -> Path:
    import pyarrow
    import pyarrow.parquet

    path.parent.mkdir(parents=True, exist_ok=True)
    pyarrow.parquet.write_table(pyarrow.table(columns), path, row_group_size=group)
    return path


@needs_arrow
@pytest.mark.parametrize("kind", ["bytes", "struct", "path"])
def test_parquet_holds_bytes_structs_or_paths(tmp_path: Path, kind: str) -> None:
    for index in range(10):
        (tmp_path / "files").mkdir(exist_ok=True)
        (tmp_path / "files" / f"{index}.png").write_bytes(png(index, (40, 50 + index)))
    data: dict[str, list[Any]] = {
        "bytes": [png(index, (40, 50 + index)) for index in range(10)],
        "struct": [{"bytes": png(index, (40, 50 + index)), "path": f"{index}.png"} for index in range(10)],
        "path": [f"files/{index}.png" for index in range(10)],
    }
    captions = [f" caption {index} " if index % 2 else None for index in range(10)]
    write(tmp_path / "a.parquet", {"image": data[kind][:7], "text": captions[:7]}, 3)
    write(tmp_path / "b.parquet", {"image": data[kind][7:], "text": captions[7:]})
    found = open_image_set([tmp_path / "a.parquet"])
    assert len(found) == 7
    images = ParquetImages([tmp_path / "a.parquet", tmp_path / "b.parquet"], tmp_path)
    assert len(images) == 10
    again = pickle.loads(pickle.dumps(images))
    for index in (9, 0, 4, 6, 7):
        image, caption, skipped = images.read(index)
        assert image.getpixel((0, 0)) == (index, 0, 0)
        assert (caption, skipped) == (f"caption {index}" if index % 2 else "", [])
        assert images.shape(index) == (40, 50 + index)
        assert again.read(index).image.tobytes() == image.tobytes()
    assert len({images.name(index) for index in range(10)}) == 10
    assert len(images._kept) <= WINDOW
    orders = [[images.order(epoch * 10 + place, 5) for place in range(10)] for epoch in range(2)]
    assert [sorted(map(int, order)) for order in orders] == [list(range(10))] * 2  # type: ignore[arg-type]
    assert orders[0] != orders[1]
    before = images.fingerprint()
    write(tmp_path / "b.parquet", {"image": data[kind][6:], "text": captions[6:]})
    assert ParquetImages([tmp_path / "a.parquet", tmp_path / "b.parquet"], tmp_path).fingerprint() != before


@needs_arrow
def test_parquet_from_others_is_judged(tmp_path: Path) -> None:
    (tmp_path / "out.png").write_bytes(png(1))
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "link.png").symlink_to(tmp_path / "out.png")
    bad = ["../out.png", str(tmp_path / "out.png"), "link.png", "", "x\0y", "none.png"]
    images = ParquetImages([write(tmp_path / "data" / "x.parquet", {"image": bad})], tmp_path / "data")
    for index in range(len(bad)):
        with pytest.raises(ValueError, match=r"^image .*(row \d: expected|expected an image file, got no such file)"):
            images.read(index)
    junk = ParquetImages([write(tmp_path / "y.parquet", {"image": [b"junk", b""]})], tmp_path)
    for index, message in ((0, "expected a readable image"), (1, "expected bytes or a path")):
        with pytest.raises(ValueError, match=message):
            junk.read(index)
    with pytest.raises(ValueError, match="a column with images"):
        ParquetImages([write(tmp_path / "z.parquet", {"label": [1]})], tmp_path)
    (tmp_path / "w.parquet").write_bytes(b"PAR1 junk PAR1")
    with pytest.raises(ValueError, match="expected a whole Parquet file"):
        ParquetImages([tmp_path / "w.parquet"], tmp_path)


def make_sources(place: Path) -> list[SourceConfig]:
    """One configuration of every kind of source, the stored ones with three images each."""
    for index in range(3):
        (place / "folder").mkdir(parents=True, exist_ok=True)
        (place / "folder" / f"{index}.png").write_bytes(png(10 + index, (60, 40)))
    (place / "shards").mkdir()
    make_shard(place / "shards" / "0.tar", ["20", "21", "22"])
    kinds = ["photographs", "scenes", "text", "folder", "shards"]
    if find_spec("pyarrow") is not None:
        write(place / "parquet" / "0.parquet", {"image": [png(30 + index, (40, 90)) for index in range(3)]})
        kinds.append("parquet")
    stored = ("folder", "shards", "parquet")
    return [SourceConfig(kind, str(place / kind) if kind in stored else "") for kind in kinds]  # type: ignore[arg-type]


def test_every_source_keeps_the_contract(tmp_path: Path) -> None:
    import random

    sources = make_sources(tmp_path)
    assert {config.kind for config in sources} | {"parquet"} == set(SOURCES)
    for config in sources:
        source = SOURCES[config.kind](config)
        index = source.locate(1, 7)
        assert source.locate(1, 7) == index
        if source.size is not None:
            assert sorted(source.locate(place, 7) for place in range(source.size)) == list(range(source.size))
        height, width = source.shape(index)
        assert 0.4 <= height / width <= 2.25
        assert source.shape(index) == (height, width)
        assert source.name(index)
        for size in ((32, 32), (32, 48)):
            made = [source.sample(index, size, random.Random(3)).image for _ in range(2)]
            assert made[0].size == size[::-1]
            assert made[0].tobytes() == made[1].tobytes()


def test_buckets_take_every_source(tmp_path: Path) -> None:
    configs = make_sources(tmp_path)
    sources = [SOURCES[config.kind](config) for config in configs]
    config = BucketConfig(min_pixels=32**2, max_pixels=64**2, cell=16, step=16)
    data = AnySize(sources, config)
    stored = sum(source.size or 0 for source in sources)
    endless = sum(source.size is None for source in sources)
    assert len(data) == stored + 3 * endless  # of equal weight: as many of each as of a stored one
    batches = BucketBatches(data.sizes, 2, seed=0).one_pass(0)
    seen = set()
    for draws in batches:
        batch = collate([data[draw] for draw in draws])
        assert tuple(batch.images.shape[2:]) == draws[0].size
        seen |= {draw.index for draw in draws}
    assert seen == set(range(len(data)))
    alone = AnySize([sources[1]], config)
    assert len(alone) == ENDLESS_PASS
    assert len(set(alone.sizes)) > 3
    draw = BucketBatches(alone.sizes, 2, seed=0).one_pass(0)[0][0]
    assert torch.equal(alone[draw]["image"], alone[draw]["image"])
    assert not torch.equal(alone[draw]["image"], alone[draw._replace(seed=draw.seed + 1)]["image"])


def test_a_mixture_of_every_source_shows_stored_images_once_a_pass(tmp_path: Path) -> None:
    configs = make_sources(tmp_path)
    mixture = Mixture(DataConfig(tuple(configs)), (32, 48), seed=1)
    found: dict[int, list[int]] = {}
    for position in range(6 * len(configs)):
        number, index = mixture.locate(position)
        found.setdefault(number, []).append(index)
        assert mixture[position]["image"].shape == (3, 32, 48)
    for number, indices in found.items():
        if mixture.sources[number].size is not None:
            assert sorted(indices[:3]) == sorted(indices[3:6]) == [0, 1, 2]


def test_files_and_folders_of_several_kinds_are_one_set(tmp_path: Path) -> None:
    make_sources(tmp_path)
    (tmp_path / "a.png").write_bytes(png(1))
    (tmp_path / "b.png").write_bytes(b"junk")
    found = open_image_set([tmp_path / "a.png", tmp_path / "folder", tmp_path / "shards" / "0.tar", tmp_path / "b.png"])
    names = [found.name(index) for index in range(len(found))]
    assert names[:4] == ["a.png", "folder/0.png", "folder/1.png", "folder/2.png"]
    assert names[4:] == ["0/20.png", "0/21.png", "0/22.png", "b.png"]
    assert np.asarray(found.read(5).image)[0, 0, 0] == 21
    with pytest.raises(ValueError, match=r"b\.png: expected a readable image"):
        found.read(7)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"expected image files .*, .tar or .parquet files below"):
        open_image_set([tmp_path / "empty"])
