"""Data: a position decides everything; files that cannot be read are reported, counted and skipped."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image

from tokenizers_mm.data.photographs import PHOTOGRAPHS, fixed_crops, photographs
from tokenizers_mm.data.scenes import COLOURS, SHAPES, make_scene
from tokenizers_mm.data.sources import DataConfig, Mixture, Positions, SourceConfig, list_images, make_loader


def folder_of_images(path: Path, count: int) -> Path:
    path.mkdir()
    for index in range(count):
        Image.new("RGB", (40 + index, 36), (index * 10, 100, 50)).save(path / f"{index:02d}.png")
    return path


def take(config: DataConfig, start: int, count: int, size: tuple[int, int] = (32, 32)) -> list:
    batches = iter(make_loader(Mixture(config, size, seed=3), Positions(4, start)))
    return [next(batches) for _ in range(count)]


@pytest.mark.parametrize("workers", [0, 2])
def test_a_later_start_gives_the_same_batches(workers: int) -> None:
    sources = (SourceConfig("photographs", colour=0.3, turns=True), SourceConfig("scenes"))
    whole = take(DataConfig(sources, workers), 0, 6)
    rest = take(DataConfig(sources, 0), 4 * 4, 2)  # a start is counted in samples
    for a, b in zip(whole[4:], rest, strict=True):
        assert torch.equal(a.images, b.images)
        assert a.captions == b.captions
    assert not torch.equal(whole[0].images, whole[1].images)
    assert whole[0].images.shape == (4, 3, 32, 32)
    assert float(whole[0].images.abs().max()) <= 1


def test_ranks_share_out_the_positions() -> None:
    one = [next(iter_) for iter_ in [iter(Positions(4))] for _ in range(4)]
    two = []
    ranks = [iter(Positions(2, rank=rank, world=2)) for rank in range(2)]
    for _ in range(4):
        two.append([p for rank in ranks for p in next(rank)])
    assert one == two


def test_a_pass_over_a_folder_shows_every_file_once_in_a_new_order(tmp_path: Path) -> None:
    folder = folder_of_images(tmp_path / "a", 8)
    (folder / "03.txt").write_text("the third {one}")
    batches = take(DataConfig((SourceConfig("folder", str(folder)),)), 0, 4)
    reds = [round((float(image[0].mean()) + 1) * 127.5) for batch in batches for image in batch.images]
    assert sorted(reds[:8]) == sorted(reds[8:]) == [0, 10, 20, 30, 40, 50, 60, 70]
    assert reds[:8] != reds[8:]
    captions = [caption for batch in batches for caption in batch.captions]
    assert captions[reds.index(30)] == "the third {one}"
    assert sum(bool(caption) for caption in captions) == 2


def test_corrupt_files_are_named_and_skipped(tmp_path: Path) -> None:
    folder = folder_of_images(tmp_path / "a", 6)
    (folder / "broken.png").write_bytes(b"not a picture")
    data = (folder / "00.png").read_bytes()
    (folder / "short.png").write_bytes(data[: len(data) // 2])
    batches = take(DataConfig((SourceConfig("folder", str(folder)),), workers=1), 0, 2)
    assert all(batch.images.shape[0] == 4 for batch in batches)
    skipped = [name for batch in batches for name in batch.skipped]
    assert len(skipped) >= 2
    assert any("broken.png" in name for name in skipped)
    assert any("short.png" in name for name in skipped)


def test_empty_and_missing_folders_get_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"images: expected image files .* got none"):
        list_images(tmp_path)
    with pytest.raises(ValueError, match="images: expected a folder, got"):
        list_images(tmp_path / "nothing")
    (tmp_path / "a.png").write_bytes(b"junk")
    source = DataConfig((SourceConfig("folder", str(tmp_path)),))
    with pytest.raises(ValueError, match=r"at least one readable image, got image .*a\.png"):
        Mixture(source, (8, 8), 0)[0]


def test_photographs_are_split_by_photograph() -> None:
    assert not PHOTOGRAPHS["train"].keys() & PHOTOGRAPHS["heldout"].keys()
    assert len(photographs("train")) == 16
    crops = fixed_crops("heldout", 64, 64)
    assert [c.size for c in crops] == [(64, 64)] * 64
    assert [c.tobytes() for c in crops] == [c.tobytes() for c in fixed_crops("heldout", 64, 64)]


def test_scenes_are_decided_by_their_seed_and_say_what_they_show() -> None:
    scenes = [make_scene(i) for i in range(300)]
    assert scenes == [make_scene(i) for i in range(300)]
    heldout = [make_scene(i, "heldout") for i in range(300)]
    assert not set(scenes) & set(heldout)
    assert {s.objects[0].shape for s in scenes} == set(SHAPES)
    assert {s.objects[0].colour for s in scenes} == set(COLOURS)
    for scene in scenes:
        first, *others = scene.objects
        assert all(first.radius > 1.6 * other.radius for other in others)
        assert scene.caption.startswith(f"a large {first.colour} {first.shape} at the ")
        x, y = (min(63, int(c * 64)) for c in first.centre)
        assert scene.render(64).getpixel((x, y)) == COLOURS[first.colour]
    with pytest.raises(ValueError, match="scene: expected split"):
        make_scene(1 << 40)


def test_text_is_rendered_by_its_position() -> None:
    mixture = Mixture(DataConfig((SourceConfig("text"),)), (32, 48), 0)
    first, second = mixture[0]["image"], mixture[1]["image"]
    assert first.shape == (3, 32, 48)
    assert torch.equal(first, mixture[0]["image"])
    assert not torch.equal(first, second)
    ink = [float(mixture[i]["image"].flatten(1).std(1).mean()) for i in range(8)]
    assert min(ink) > 0.1  # letters on a ground, never a plain image


def test_channels_change_places_and_nothing_else() -> None:
    plain = SourceConfig("photographs", zoom=(1.0, 1.0))
    mixed = replace(plain, channels=1.0)
    changed = 0
    for position in range(12):
        a, b = (Mixture(DataConfig((source,)), (16, 16), 0)[position]["image"] for source in (plain, mixed))
        changed += not torch.equal(a, b)
        assert sorted(channel.sum().item() for channel in a) == pytest.approx(sorted(c.sum().item() for c in b))
        assert torch.equal(a.sort(0).values, b.sort(0).values)
    assert changed > 0
