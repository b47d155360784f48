"""Computed orders: permutations, mixtures without gaps, and lists that are not copied."""

import io
import itertools
import pickle
import random
import tarfile
import time
from collections import Counter
from pathlib import Path

import pytest
import torch
from PIL import Image

from tokenizers_mm.data import shards
from tokenizers_mm.data.files import FileList
from tokenizers_mm.data.order import Interleaving, permute, shuffled
from tokenizers_mm.data.shards import Shards
from tokenizers_mm.data.sources import DataConfig, Mixture, SourceConfig


@pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 7, 8, 100, 1023, 1024, 1025])
def test_a_permutation_takes_every_value_once(size: int) -> None:
    for key in range(5):
        assert sorted(permute(index, size, key) for index in range(size)) == list(range(size))


def test_a_permutation_looks_random() -> None:
    """No fixed step, no place that a value prefers, other orders for other keys."""
    size, keys = 50, 4000
    firsts = Counter(permute(0, size, key) for key in range(keys))
    chi_square = sum((firsts[value] - keys / size) ** 2 / (keys / size) for value in range(size))
    assert chi_square < 100  # 49 degrees of freedom: above this in fewer than 3 of 100,000 draws
    order = [permute(index, 10_000, 1) for index in range(10_000)]
    steps = Counter((b - a) % 10_000 for a, b in itertools.pairwise(order))
    assert max(steps.values()) < 12
    assert len({tuple(permute(index, 20, key) for index in range(20)) for key in range(100)}) == 100


def test_a_position_among_ten_million_takes_microseconds() -> None:
    size = 10_000_000
    positions = [random.Random(0).randrange(10 * size) for _ in range(2000)]
    best = min(_seconds(positions, size) for _ in range(5)) / len(positions)
    assert best < 20e-6 * 3, f"{best * 1e6:.1f} microseconds"  # a bar of 20 on a machine of its own


def _seconds(positions: list[int], size: int) -> float:
    started = time.perf_counter()
    for position in positions:
        shuffled(position, size, 7)
    return time.perf_counter() - started


def test_every_source_is_gone_through_in_order_without_gaps_and_has_its_share() -> None:
    weights = [3.0, 1.0, 0.0, 0.001]
    mixture = Interleaving(weights)
    found: dict[int, int] = {}
    for position in range(10_000):
        source, place = mixture(position)
        assert place == found.get(source, 0)
        found[source] = place + 1
        share = weights[source] / sum(weights)
        assert abs(found[source] - share * (position + 1)) < 4 + position * 1e-6
    assert sum(found.values()) == 10_000
    assert found.keys() == {0, 1, 3}


def test_a_mixture_shows_each_sample_of_each_source_once_per_pass(tmp_path: Path) -> None:
    for name, count in (("a", 6), ("b", 5)):
        (tmp_path / name).mkdir()
        for index in range(count):
            Image.new("RGB", (40, 40)).save(tmp_path / name / f"{index}.png")
    sources = tuple(SourceConfig("folder", str(tmp_path / name), weight) for name, weight in (("a", 0.75), ("b", 0.25)))
    mixture = Mixture(DataConfig(sources), (32, 32), seed=0)
    found: dict[int, list[int]] = {0: [], 1: []}
    for position in range(400):
        source, index = mixture.locate(position)
        found[source].append(index)
    for source, size in ((0, 6), (1, 5)):
        order = found[source]
        passes = [order[start : start + size] for start in range(0, len(order) - size, size)]
        assert len(passes) > 15
        assert all(sorted(one) == list(range(size)) for one in passes)
        assert len(set(map(tuple, passes))) > 10


def test_a_list_of_files_is_two_tensors(tmp_path: Path) -> None:
    names = [f"folder/{index:07d}.png" for index in range(100_000)] + ["odd \udcff name.png"]
    files = FileList(tmp_path, names)
    assert len(files) == 100_001
    assert files[99_999] == tmp_path / "folder/0099999.png"
    assert files[-1] == tmp_path / "odd \udcff name.png"
    assert files[1:3] == [tmp_path / "folder/0000001.png", tmp_path / "folder/0000002.png"]
    with pytest.raises(IndexError):
        files[100_001]
    assert all(isinstance(value, (torch.Tensor, Path)) for value in vars(files).values())
    assert pickle.loads(pickle.dumps(files))[5] == files[5]


def make_shard(path: Path, names: list[str], broken: str = "") -> None:
    with tarfile.open(path, "w") as file:
        for index, name in enumerate(names):
            image = io.BytesIO()
            Image.new("RGB", (40, 40), (int(Path(name).name), 0, 0)).save(image, "PNG")
            for kind, data in ((".png", image.getvalue()), (".txt", f"caption {name}".encode()), (".json", b"{}")):
                if kind == ".txt" and index % 2:
                    continue
                member = tarfile.TarInfo(name + kind)
                data = b"junk" if name == broken and kind == ".png" else data
                member.size = len(data)
                file.addfile(member, io.BytesIO(data))


def test_shards_are_read_at_any_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_shard(tmp_path / "1.tar", ["x/10", "x/11", "long" * 40 + "/12"])
    make_shard(tmp_path / "0.tar", ["20", "21"], broken="21")
    source = Shards(tmp_path)
    assert len(source) == 5
    image, caption, skipped = source.read(4)
    assert (image.getpixel((0, 0)), caption, skipped) == ((12, 0, 0), f"caption {'long' * 40}/12", [])
    assert source.read(3).caption == ""
    with pytest.raises(ValueError, match=r"0.tar at byte \d+: expected a readable image"):
        source.read(1)
    monkeypatch.setattr(shards, "_scan", lambda *_: 1 / 0)  # a second start reads the index alone
    assert torch.equal(Shards(tmp_path).places, source.places)
    monkeypatch.undo()
    make_shard(tmp_path / "2.tar", ["x/30"])
    assert len(Shards(tmp_path)) == 6
    (tmp_path / shards.INDEX).write_bytes(b"junk")
    assert len(Shards(tmp_path)) == 6
    mixture = Mixture(DataConfig((SourceConfig("shards", str(tmp_path)),)), (32, 32), seed=0)
    samples = [mixture[position] for position in range(12)]
    assert sum(len(sample["skipped"]) for sample in samples) == 2
    (tmp_path / "3.tar").write_bytes(b"no tar file" * 100)
    with pytest.raises(ValueError, match=r"shard .*3.tar: expected an uncompressed tar file, got ReadError"):
        Shards(tmp_path)
