"""Whole data sets to ids: every kind of input and output, broken files, runs that are killed, and what reads it all."""

import gc
import io
import json
import signal
import subprocess
import sys
import tarfile
import time
import unicodedata
import warnings
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from benchmarks.tiny import dualvitok_config as tiny_dualvitok
from benchmarks.tiny import tokenflow_config as tiny_tokenflow
from tests.cases import ROOT
from tokenizers_mm import load
from tokenizers_mm.cli import main
from tokenizers_mm.cli.decode import Names
from tokenizers_mm.cli.progress import Progress, duration
from tokenizers_mm.data.codes import CodesOfImage, read_codes
from tokenizers_mm.data.order import BlockOrder
from tokenizers_mm.data.shard_engines import ShardBatch
from tokenizers_mm.data.token_shards import TokenShards, read_shards
from tokenizers_mm.data.tokenizing import EncodeBatch, Encoding
from tokenizers_mm.models import DualViTok, TokenFlow

needs_arrow = pytest.mark.skipif(find_spec("pyarrow") is None, reason="pyarrow is not installed")
COUNT = 24


def noise(seed: int, size: tuple[int, int] = (32, 32)) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8))


def png(image: Image.Image) -> bytes:
    stream = io.BytesIO()
    image.save(stream, "PNG")
    return stream.getvalue()


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tokenizer, and the same images as files, as tar shards and as records; one of them is broken."""
    place = tmp_path_factory.mktemp("sets")
    torch.manual_seed(0)
    TokenFlow.from_config(tiny_tokenflow()).save(place / "tok")
    (place / "images" / "b").mkdir(parents=True)
    with tarfile.open(place / "x.tar", "w") as archive:
        for index in range(COUNT):
            data = png(noise(index)) if index != 5 else b"junk"
            name = f"b/{index:02d}" if index > 20 else f"{index:02d}"
            (place / "images" / f"{name}.png").write_bytes(data)
            (place / "images" / f"{name}.txt").write_text(f"caption {index}")
            for ending, content in (("png", data), ("txt", f"caption {index}".encode())):
                member = tarfile.TarInfo(f"{index:02d}.{ending}")
                member.size = len(content)
                archive.addfile(member, io.BytesIO(content))
    rows: list[Any] = [{"id": i, "content": [{"image": f"images/{i:02d}.png"}, {"text": "é"}]} for i in range(8)]
    (place / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return place


def arguments(place: Path, verb: str, *more: Any) -> list[str]:
    return [verb, *map(str, more), "--tokenizer", str(place / "tok")]


@pytest.fixture(scope="module")
def expected(place: Path) -> dict[int, list[int]]:
    """Stable ids by number."""
    tokenizer = load(place / "tok")
    images = [noise(index) for index in range(COUNT)]
    return dict(enumerate(tokenizer.encode(images, stable=True).ids.tolist()))


@pytest.mark.parametrize("ending", [".safetensors", ".npz", pytest.param(".parquet", marks=needs_arrow)])
def test_a_folder_becomes_a_file_and_comes_back_with_its_names(
    place: Path, tmp_path: Path, expected: dict[int, list[int]], ending: str, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / f"ids{ending}"
    assert main(arguments(place, "encode", place / "images", "--out", out, "--stable", "--workers", 2)) == 0
    said = capsys.readouterr()
    assert f"{COUNT - 1} images, 1 skipped" in said.out
    assert "decided again in float64" in said.out
    assert said.err.count("05.png: expected a readable image") == 1
    items = list(read_codes(out))
    names = sorted(p.relative_to(place / "images").as_posix() for p in (place / "images").rglob("*.png"))
    names.remove("05.png")
    assert [item.name for item in items] == names
    for item in items:
        number = int(Path(item.name).stem)
        assert item.caption == f"caption {number}"
        assert item.values.tolist() == expected[number]
    assert [path.name for path in tmp_path.iterdir()] == [out.name]
    assert main(arguments(place, "decode", out, "--out-dir", tmp_path / "o")) == 0
    assert sorted(p.relative_to(tmp_path / "o").as_posix() for p in (tmp_path / "o").rglob("*.png")) == names
    assert main(arguments(place, "encode", place / "images", "--out", out, "--strict")) == 2


@pytest.mark.parametrize("form", ["webdataset", pytest.param("parquet", marks=needs_arrow)])
@pytest.mark.parametrize("source", ["images", "x.tar"])
def test_shards_of_every_input_hold_every_image_once(
    place: Path, tmp_path: Path, expected: dict[int, list[int]], form: str, source: str
) -> None:
    out = tmp_path / "shards"
    command = arguments(place, "tokenize", place / source, "--out", out, "--format", form, "--shard-size", 7)
    assert main(command) == 0
    shards = TokenShards(out)
    assert len(shards) == COUNT - 1
    rows = [shards[index] for index in range(len(shards))]
    numbers = [int(Path(row["name"]).stem) for row in rows]
    assert numbers == [number for number in range(COUNT) if number != 5]
    for number, row in zip(numbers, rows, strict=True):
        assert row["ids"].tolist() == expected[number]
        assert (row["caption"], row["height"], row["width"]) == (f"caption {number}", 32, 32)
    manifest = shards.manifest
    assert (manifest["images"], manifest["failures"], manifest["ids_per_image"]) == (COUNT - 1, 1, 21.0)
    assert manifest["failures_by_cause"] == {"a readable image": 1}
    assert manifest["failed"][0]["row"] == 5
    assert [shard["first"] for shard in manifest["shards"]] == [0, 7, 14, 21]
    for epoch in range(2):
        order = [shards.order(epoch * len(shards) + place, 3) for place in range(len(shards))]
        assert sorted(order) == list(range(len(shards)))
        assert order != sorted(order)
    before = {path: path.stat().st_mtime_ns for path in out.glob("part-*")}
    assert main(command) == 0  # nothing is done twice
    assert before == {path: path.stat().st_mtime_ns for path in out.glob("part-*")}
    assert main([*command[:-4], "--shard-size", "5", *command[-2:]]) == 2  # another run's folder


@pytest.mark.parametrize("form", ["jsonl", "webdataset", pytest.param("parquet", marks=needs_arrow)])
def test_records_keep_every_other_key(place: Path, tmp_path: Path, expected: dict[int, list[int]], form: str) -> None:
    out = tmp_path / "shards"
    command = arguments(place, "tokenize", place / "rows.jsonl", "--out", out, "--format", form, "--shard-size", 3)
    assert main(command) == 0
    rows = list(read_shards(out))
    assert [row["id"] for row in rows if isinstance(row, dict)] == [0, 1, 2, 3, 4, 6, 7]  # 5 is broken
    for row in rows:
        assert isinstance(row, dict)
        codes = {"height": 32, "width": 32, "ids": expected[row["id"]], "tokenizer": load(place / "tok").fingerprint()}
        assert row["content"] == [{"codes": codes}, {"text": "é"}]
    assert TokenShards(out).manifest["failures"] == 1


def test_images_of_several_sizes_go_through_in_one_run(tmp_path: Path) -> None:
    torch.manual_seed(0)
    DualViTok.from_config(tiny_dualvitok()).save(tmp_path / "tok")
    (tmp_path / "images").mkdir()
    sizes = [(32, 32), (64, 32), (40, 70), (32, 32)]
    for index, size in enumerate(sizes):
        noise(index, size).save(tmp_path / "images" / f"{index}.png")
    out = tmp_path / "ids.npz"
    assert (
        main(arguments(tmp_path, "encode", tmp_path / "images", "--out", out, "--fit", "crop", "--batch-size", 2)) == 0
    )
    tokenizer = load(tmp_path / "tok")
    for index, item in enumerate(read_codes(out)):
        codes = tokenizer.encode(tmp_path / "images" / f"{index}.png", fit="crop")
        assert (item.height, item.width) == (codes.height, codes.width)
        assert float((item.values == codes.ids[0]).double().mean()) > 0.9


def start(command: list[str]) -> "subprocess.Popen[bytes]":
    run = [sys.executable, "-m", "tokenizers_mm.cli", *command]
    return subprocess.Popen(run, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_run_that_is_killed_ends_with_the_same_bytes(place: Path, tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "images.tar", "w") as archive:
        for index in range(200):
            data = png(noise(index)) if index != 99 else b"junk"
            member = tarfile.TarInfo(f"{index:03d}.png")
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))

    def command(out: str, *more: Any) -> list[str]:
        more = ("--shard-size", 8, *more)
        return arguments(place, "tokenize", tmp_path / "images.tar", "--out", tmp_path / out, *more)

    assert main(command("whole")) == 0
    process = start(command("killed", "--workers", 2, "--batch-size", 3))
    done = tmp_path / "killed" / ".tokenizers_mm"
    deadline = time.monotonic() + 120
    while process.poll() is None and len(list(done.glob("0*.json"))) < 3 and time.monotonic() < deadline:
        time.sleep(0.01)
    assert process.poll() is None
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert len(list(done.glob("0*.json"))) < 25
    assert main(command("killed")) == 0
    assert contents(tmp_path / "killed") == contents(tmp_path / "whole")
    assert TokenShards(tmp_path / "killed").manifest["images"] == 199


def test_the_function_for_ray_and_datasets(place: Path, expected: dict[int, list[int]]) -> None:
    encode = EncodeBatch(lambda: load(place / "tok"), Encoding())
    images = [png(noise(0)), {"bytes": png(noise(1)), "path": None}, noise(2), b"junk", None]
    found = encode({"image": images, "label": [1, 2, 3, 4, 5]})
    assert found["label"] == [1, 2, 3, 4, 5]
    assert [None if ids is None else ids.tolist() for ids in found["ids"]] == [
        *(expected[i] for i in range(3)),
        None,
        None,
    ]
    assert [bool(error) for error in found["error"]] == [False, False, False, True, True]
    assert found["height"][:4] == [32, 32, 32, None]


def test_shards_made_by_ray_are_those_of_this_machine(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A stand-in for Ray Data, which maps the class over its rows as Ray does: pickled, one row at a time."""
    import pickle

    class Items(list[dict[str, Any]]):
        def map_batches(
            self, kind: Any, *, fn_constructor_args: Any, batch_size: int, compute: Any, batch_format: str
        ) -> "Items":
            assert kind is ShardBatch
            assert (batch_size, batch_format) == (1, "numpy")
            assert compute == {"min_size": 1, "max_size": 3}  # no more than one actor has to find a place
            call = pickle.loads(pickle.dumps(kind(*fn_constructor_args)))
            batches = [call({"shard": np.array([row["shard"]])}) for row in self]
            return Items({key: values[0] for key, values in batch.items()} for batch in batches)

        def iter_rows(self) -> "Items":
            return self

    ray: Any = type(sys)("ray")
    ray.data = type(sys)("ray.data")
    ray.data.from_items, ray.data.ActorPoolStrategy = Items, dict
    monkeypatch.setitem(sys.modules, "ray", ray)
    monkeypatch.setitem(sys.modules, "ray.data", ray.data)
    for out, engine in (("a", "local"), ("b", "ray")):
        more = ("--engine", engine, "--shard-size", 10, "--workers", 3 if engine == "ray" else 1)
        assert main(arguments(place, "tokenize", place / "images", "--out", tmp_path / out, *more)) == 0
    assert contents(tmp_path / "a") == contents(tmp_path / "b")


@needs_arrow
def test_shards_are_read_by_webdataset_and_datasets(place: Path, tmp_path: Path) -> None:
    for form in ("webdataset", "parquet"):
        more = ("--format", form, "--shard-size", 12)
        assert main(arguments(place, "tokenize", place / "images", "--out", tmp_path / form, *more)) == 0
    import pyarrow.parquet

    table = pyarrow.parquet.read_table(tmp_path / "parquet")
    assert table.column_names == ["name", "caption", "height", "width", "ids"]
    assert table.num_rows == COUNT - 1
    if find_spec("webdataset") is None:
        pytest.skip("webdataset is not installed")
    import webdataset

    files = sorted(str(path) for path in (tmp_path / "webdataset").glob("*.tar"))
    reader: Any = webdataset
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)  # it leaves its files to the garbage collector
        samples = list(reader.WebDataset(files, shardshuffle=False, empty_check=False).decode())
        gc.collect()
    assert len(samples) == COUNT - 1
    assert samples[0]["ids.npy"].shape == (21,)
    assert samples[0]["json"]["caption"] == "caption 0"


def test_no_name_leads_out_of_the_folder(tmp_path: Path) -> None:
    names = Names(tmp_path)
    bad = [
        "../../x.png",
        "/etc/passwd.png",
        "a/../../b.png",
        "",
        "..",
        "x\0y",
        "c\\..\\d.jpg",
        "x" * 300,
        ".hidden",
        "a/x.png",
    ]
    paths = [names(name) for name in [*bad, *bad]]
    assert len(set(paths)) == len(paths)
    for path in paths:
        assert path.suffix == ".png"
        assert ".." not in path.parts
        assert path.is_relative_to(tmp_path)
    assert names("dir/photo.jpeg") == tmp_path / "dir" / "photo.png"
    same = [names(name).stem for name in ("\u00e9", "e\u0301", "\u00c9", "stra\u00dfe", "STRASSE", "\ufb01", "fi")]
    assert len({unicodedata.normalize("NFKC", stem).casefold() for stem in same}) == len(same), "one file on some disks"


def test_shards_from_others_are_judged(tmp_path: Path) -> None:
    def tar(members: dict[str, bytes]) -> Path:
        with tarfile.open(tmp_path / "part-00000.tar", "w") as archive:
            for name, data in members.items():
                member = tarfile.TarInfo(name)
                member.size = len(data)
                archive.addfile(member, io.BytesIO(data))
        return tmp_path / "part-00000.tar"

    facts = json.dumps({"height": 32, "width": 32}).encode()
    array = io.BytesIO()
    np.save(array, np.array([{"a": 1}], dtype=object), allow_pickle=True)
    header = b"\x93NUMPY\x01\x00v\x00{'descr': '<i8', 'fortran_order': False, 'shape': (1000000000000,), }"
    whole = io.BytesIO()
    np.save(whole, np.arange(3))
    for members, message in [
        ({"0.ids.npy": array.getvalue(), "0.json": facts}, "expected an .npy file"),
        ({"0.ids.npy": header.ljust(128) + b"\0" * 64, "0.json": facts}, "expected an .npy file"),
        ({"0.ids.npy": whole.getvalue(), "0.json": b"[" * 100_000}, "expected JSON"),
        ({"0.ids.npy": whole.getvalue(), "0.json": b"{}"}, "expected sizes of images"),
        ({"0.ids.npy": whole.getvalue(), "0.json": b'{"height": 1e9, "width": true}'}, "expected sizes of images"),
        ({"0.latents.npy": whole.getvalue(), "0.json": facts}, "expected ids or latents"),
        ({"0.ids.npy": whole.getvalue()}, "expected JSON"),
    ]:
        with pytest.raises(ValueError, match=message):
            list(read_shards(tar(members)))
    good = list(read_shards(tar({"0.ids.npy": whole.getvalue(), "0.json": facts})))
    assert isinstance(good[0], CodesOfImage)
    assert good[0].values.tolist() == [0, 1, 2]
    (tmp_path / "_manifest.json").write_text(json.dumps({"shards": [{"file": "../x.tar", "rows": 1}]}))
    with pytest.raises(ValueError, match="names of files in the folder"):
        TokenShards(tmp_path)


def test_block_orders_show_everything_once_and_stay_in_a_window() -> None:
    counts, window = [3, 1, 7, 5, 2, 6], 2
    order = BlockOrder(counts, window)
    starts = np.concatenate([[0], np.cumsum(counts)])
    passes = [[order(epoch * 24 + place, 9) for place in range(24)] for epoch in range(3)]
    for found in passes:
        assert sorted(found) == list(range(24))
        blocks = [int(np.searchsorted(starts, index, side="right")) - 1 for index in found]
        first = {block: blocks.index(block) for block in set(blocks)}
        for block in set(blocks):
            last = len(blocks) - 1 - blocks[::-1].index(block)
            assert len(set(blocks[first[block] : last + 1])) <= window
    assert passes[0] != passes[1]
    assert order(5, 9) == passes[0][5]  # going back


def test_the_progress_line_tells_speed_and_time_left(capsys: pytest.CaptureFixture[str]) -> None:
    progress = Progress(5000, done=1000, every=0.0)
    progress(200)
    assert progress.line(2.0) == "1200 / 5000 images (24 %), 100 images/s, 0:38 left"
    assert "1200 / 5000 images (24 %)" in capsys.readouterr().err
    assert [duration(seconds) for seconds in (7, 65, 7500)] == ["0:07", "1:05", "2:05:00"]
