"""Data sets and shards that anybody may have written: read right, or refused with one sentence that names the file."""

import io
import json
import multiprocessing
import os
import signal
import struct
import tarfile
import time
import zipfile
from collections.abc import Callable
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from tests.models.test_saving import fork
from tests.models.test_untrusted_configs import address_space
from tokenizers_mm._files import LOCK, STAGING
from tokenizers_mm.data.codes import CodesOfImage, read_codes
from tokenizers_mm.data.open_images import open_image_set
from tokenizers_mm.data.shard_engines import run_processes
from tokenizers_mm.data.shards import INDEX, Shards
from tokenizers_mm.data.token_shards import DONE, TokenShards, read_shard, write_shard
from tokenizers_mm.data.tokenizing import PLAN, Encoding, Failure, Job, begun, finish, finished, forget, run_shard

END = bytes(1024)


def refusal(read: Callable[[], Any]) -> str | None:
    """The sentence of a refusal, or None; any other error ends the test."""
    try:
        read()
    except ValueError as error:
        message = str(error)
    else:
        return None
    assert ": expected " in message
    return message


def png(size: int = 8) -> bytes:
    stream = io.BytesIO()
    Image.new("RGB", (size, size), "red").save(stream, "PNG")
    return stream.getvalue()


def padded(data: bytes) -> bytes:
    return data + bytes(-len(data) % 512)


def header(name: str, size: int, kind: bytes = tarfile.REGTYPE, link: str = "") -> bytes:
    member = tarfile.TarInfo(name)
    member.size, member.type, member.linkname = size, kind, link
    return member.tobuf(tarfile.GNU_FORMAT, "utf-8", "surrogateescape")


def of_size(field: bytes) -> bytes:
    """A header whose field of the size is as it is given."""
    made = bytearray(header("a.png", 0))
    made[124:136] = field
    made[148:156] = b" " * 8
    made[148:156] = b"%06o\0 " % sum(made)
    return bytes(made)


def pax(**records: str) -> bytes:
    body = b""
    for key, value in records.items():
        text = f"{key.replace('__', '.')}={value}\n"
        count = len(text) + 3
        while len(f"{count} {text}") != count:
            count = len(f"{count} {text}")
        body += f"{count} {text}".encode()
    return header("x", len(body), tarfile.XHDTYPE) + padded(body)


def image(name: str = "b.png") -> bytes:
    return header(name, len(png())) + padded(png())


SPARSE = {"GNU__sparse__major": "1", "GNU__sparse__minor": "0", "GNU__sparse__realsize": str(10**12)}
TARS: dict[str, tuple[bytes, int]] = {
    "plain": (image() + image("c.png"), 2),
    "absolute and upward names": (image("/etc/b.png") + image("../../c.png"), 2),
    "links and devices": (
        header("a.png", 0, tarfile.SYMTYPE, "/etc/passwd") + header("d.png", 0, tarfile.CHRTYPE) + image(),
        1,
    ),
    "one name twice": (image() + image(), 1),
    "two images of one stem": (image("b.png") + image("b.jpg"), 2),
    "an empty image": (header("a.png", 0) + image(), 1),
    "a sparse member": (pax(**SPARSE) + header("a.png", 512) + padded(b"1\n0\n3\n") + image(), 1),
    "a name that is no UTF-8": (image("\udcff.png"), 1),
    "a caption alone": (header("a.txt", 3) + padded(b"abc") + image(), 1),
    "a size beyond the file": (header("a.png", 1 << 30), -1),
    "a huge size": (of_size(b"\x80\0\0\0" + struct.pack(">Q", 1 << 60)), -1),
    "a negative size": (image() + of_size(b"\xff" * 4 + struct.pack(">q", -2048)), -1),
    "a size that is no number": (image() + of_size(b"zzzzzzzzzzz\0"), -1),
    "a size of 23 digits": (pax(size="9" * 23) + image(), -1),
    "headers without an end": (pax(comment="a") * 3000 + image(), -1),
    "long names without an end": ((header("././@LongLink", 5, b"L") + padded(b"abcd\0")) * 3000 + image(), -1),
    "compressed": (b"\x1f\x8b" + bytes(600), -1),
    "text": (b"hello world" * 100, -1),
}


@pytest.mark.parametrize("kind", TARS)
def test_tar_files_of_anybody(kind: str, tmp_path: Path) -> None:
    """As images, and as shards of ids; the number of images, or -1 for a file that is refused."""
    data, expected = TARS[kind]
    path = tmp_path / "a.tar"
    path.write_bytes(data + END)
    if expected < 0:
        with pytest.raises(ValueError, match=r"expected .*, got ") as raised:
            open_image_set([path])
        assert "\n" not in str(raised.value)
        with pytest.raises(ValueError, match=f"shard {path}: expected"):
            list(read_shard(path))
        return
    found = open_image_set([path])
    assert len(found) == expected
    assert all(found.read(index).image.size == (8, 8) for index in range(expected))
    assert all(found.name(index) for index in range(expected))
    assert list(read_shard(path)) == []


def test_a_member_of_a_shard_that_comes_twice_is_refused(tmp_path: Path) -> None:
    write_shard(tmp_path / "a.tar", [(0, CodesOfImage(torch.arange(4), 8, 8, None))], "vqgan")
    data = (tmp_path / "a.tar").read_bytes()
    first = data[: 512 + len(padded(data[512 : 512 + 160]))]
    (tmp_path / "b.tar").write_bytes(first + data)
    with pytest.raises(ValueError, match="expected members with names of their own"):
        list(read_shard(tmp_path / "b.tar"))


@pytest.mark.parametrize(
    "change",
    [
        lambda places: places + torch.tensor([7, 0, 0, 0, 0]),
        lambda places: places + torch.tensor([0, 1 << 40, 0, 0, 0]),
        lambda places: torch.full_like(places, 2**63 - 1),
        lambda places: places * torch.tensor([1, 1, 1 << 40, 1, 1]),
        lambda places: places - 1,
        lambda places: places.float(),
    ],
)
def test_an_index_that_points_elsewhere_is_made_again(
    change: Callable[[torch.Tensor], torch.Tensor], tmp_path: Path
) -> None:
    (tmp_path / "a.tar").write_bytes(image() + image("c.png") + END)
    found = Shards(tmp_path)
    save_file({"places": change(found.places)}, tmp_path / INDEX, metadata={"marks": found.marks})
    assert torch.equal(Shards(tmp_path).places, found.places)
    (tmp_path / INDEX).unlink()
    os.mkfifo(tmp_path / INDEX)
    assert torch.equal(Shards(tmp_path).places, found.places)


@pytest.mark.parametrize("name", ["a.tar", "a.parquet", "a.png", "part-00000.jsonl", "part-00000.npz"])
def test_special_files_are_refused_and_not_waited_for(name: str, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / name)
    with pytest.raises(ValueError, match="got a FIFO"):
        list(read_shard(tmp_path / name)) if name.startswith("part") else open_image_set([tmp_path]).read(0)


COLUMNS: dict[str, Any] = {
    "numbers": [1, 2],
    "floats": [1.5, 2.5],
    "nothing": [None, None],
    "texts": ["x", "y"],
    "bytes": [b"x", b"y"],
    "lists": [[1], [2]],
    "texts in lists": [["a"], ["b"]],
    "floats in lists": [[1.5], [float("nan")]],
    "nothing in lists": [[None], None],
    "negative": [[-1], [1]],
    "mappings": [{"bytes": 3}, {"bytes": 4}],
    "upward paths": ["../../etc/passwd", "/etc/passwd"],
    "empty lists": [[], []],
    "huge": [2**62, 2**62],
}


@pytest.mark.parametrize("kind", COLUMNS)
def test_columns_of_odd_types(kind: str, tmp_path: Path) -> None:
    """In every column of images and of ids: read, or refused with one sentence."""
    arrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    good: dict[str, Any] = {"image": [png(), png()], "caption": ["a", "b"], "name": ["a", "b"]}
    codes: dict[str, Any] = {"ids": [[1, 2], [3, 4]], "height": [8, 8], "width": [8, 8], "name": ["a", "b"]}
    latents = {
        "latents": [[0.5, 1.5]] * 2,
        "rows": [1, 1],
        "columns": [1, 1],
        **{k: codes[k] for k in ("height", "width")},
    }
    path = tmp_path / "a.parquet"

    def images() -> None:
        found = open_image_set([path])
        for index in range(len(found)):
            assert found.name(index)
            found.read(index)

    reads: list[tuple[dict[str, Any], Callable[[], Any]]] = [(good, images)]
    reads += [(codes, lambda: list(read_codes(path))), (latents, lambda: list(read_codes(path)))]
    for columns, read in reads:
        for column in columns:
            parquet.write_table(arrow.table({**columns, column: COLUMNS[kind]}), path)
            message = refusal(read)
            assert message is None or (str(tmp_path) in message and "\n" not in message)
    parquet.write_table(arrow.table({"record": COLUMNS[kind]}), path)
    with pytest.raises(ValueError, match="expected"):
        list(read_shard(path))


@pytest.mark.parametrize("column", ["image", "ids", "record"])
def test_a_small_file_that_unpacks_to_a_large_one_is_refused(
    column: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    monkeypatch.setattr("tokenizers_mm.data.codes.MAX_ROW_GROUP", 1 << 24)
    path, count = tmp_path / "a.parquet", 100
    if column == "ids":
        value: Any = arrow.array([np.zeros(1 << 17, dtype=np.int64)] * count)
        table = arrow.table({"ids": value, "height": [8] * count, "width": [8] * count})
    else:
        value = arrow.array([b"x" * (1 << 20) if column == "image" else "x" * (1 << 20)])
        table = arrow.table({column: arrow.DictionaryArray.from_arrays(arrow.array([0] * count), value)})
        table = table.cast(arrow.schema([(column, value.type)]))
    parquet.write_table(table, path, compression="zstd", use_dictionary=True)
    del table, value
    assert path.stat().st_size < 1 << 21
    with address_space(1 << 30), pytest.raises(ValueError, match=r"row groups of at most 16777216 bytes"):
        open_image_set([path]).read(0) if column == "image" else list(read_shard(path))


def test_an_archive_that_unpacks_to_a_large_one_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tokenizers_mm.data.codes.MAX_ROW_GROUP", 1 << 20)
    np.savez_compressed(tmp_path / "a.npz", ids=np.zeros((4, 1 << 20), dtype=np.int64))
    with pytest.raises(ValueError, match="bytes when unpacked"):
        list(read_codes(tmp_path / "a.npz"))


class Numbers:
    """An input of rows that need no tokenizer; the third one fails, by an odd name."""

    def __len__(self) -> int:
        return 6

    def fingerprint(self) -> str:
        return "numbers"

    def encode(self, tokenizer: Any, numbers: range, how: Encoding, step: Callable[[int], None]) -> Any:
        rows = [(n, CodesOfImage(torch.full((4,), n), 8, 8, None, f"{n}")) for n in numbers if n != 2]
        bad = [Failure.of(2, "\udcff\x1b[2J", ValueError("a\x1b: expected b\n, got c"))] if 2 in numbers else []
        return rows, bad, len(rows), 15


class Family:
    family = "vqgan"

    def fingerprint(self) -> str:
        return f"{self.family}:{'0' * 32}"


@pytest.fixture
def job(tmp_path: Path) -> Job:
    made = Job(Numbers, Family, tmp_path / "out", "webdataset", 2, Encoding())
    with begun(made, {"rows": 6}) as missing:
        assert missing == [0, 1, 2]
        for number in missing:
            run_shard(made, Numbers(), Family(), number, lambda _: None)
        assert finish(made, {"rows": 6})["failures"] == 1
    return made


JUNK = ["", "x", "[]", "3", "null", "{}", "[" * 100_000, '{"a":' * 50_000, "1" * 6000, "\udcff"]
VALUES = [None, "x", -1, [], {}, 1e300, 10**30, [1], {"a": "b"}, {"a": -1}, "../../etc/passwd", True]


def test_reports_of_anybody_mean_that_a_shard_is_made_again(job: Job) -> None:
    """Every value of a report, and every file in its place: the shard counts as missing, or as it is."""
    place = job.done_file(1)
    whole = place.read_text()
    report = json.loads(whole)
    assert report["failed"][0]["name"].isprintable()
    texts = [*JUNK, *(json.dumps({k: v for k, v in report.items() if k != name}) for name in report)]
    texts += [json.dumps({**report, name: value}) for name in report for value in VALUES]
    for text in texts:
        place.write_bytes(text.encode("utf-8", "surrogateescape"))
        found = finished(job, 1)
        assert found is None or found.file == job.file(1)
        if found is not None:
            finish(job, {"rows": 6})
    place.unlink()
    os.mkfifo(place)
    assert finished(job, 1) is None
    place.unlink()
    place.write_text(whole)
    assert finished(job, 1) is not None
    shard = job.out / job.file(1)
    data = bytearray(shard.read_bytes())
    data[600] ^= 1
    shard.write_bytes(data)
    assert finished(job, 1) is None


def test_a_plan_of_anybody_is_refused_or_replaced(job: Job) -> None:
    place = job.out / DONE / PLAN
    for text in JUNK:
        place.write_bytes(text.encode("utf-8", "surrogateescape"))
        with (
            pytest.raises(ValueError, match="expected a new folder, or one of a run with the same"),
            begun(job, {"rows": 6}),
        ):
            pass
    with begun(job, {"rows": 6}, anew=True) as missing:
        assert missing == [0, 1, 2]
    assert sorted(path.name for path in job.out.rglob("*")) == [DONE, PLAN]


def test_manifests_of_anybody(job: Job) -> None:
    place = job.out / "_manifest.json"
    manifest = json.loads(place.read_text())
    assert len(TokenShards(job.out)) == 5
    texts = [*JUNK, *(json.dumps({**manifest, "shards": value}) for value in VALUES)]
    for key in ("file", "rows"):
        texts += [
            json.dumps({**manifest, "shards": [{**manifest["shards"][0], key: value}]})
            for value in (*VALUES, "/etc/passwd", "..", "", "a\0b")
        ]
    for text in texts:
        place.write_bytes(text.encode("utf-8", "surrogateescape"))
        message = refusal(lambda: next(iter(TokenShards(job.out)), None))
        assert message is None or str(job.out) in message
    place.unlink()
    os.mkfifo(place)
    with pytest.raises(ValueError, match="expected"):
        TokenShards(job.out)


def test_two_writers_in_one_folder(job: Job) -> None:
    """The second is refused while the first lives; nothing of a dead one stays locked."""
    child = fork()
    if child == 0:
        with begun(job, {"rows": 6}):
            time.sleep(60)
        os._exit(0)
    lock = job.out / DONE / LOCK
    while not lock.exists() or not lock.read_text():
        time.sleep(0.01)
    for anew in (False, True):
        match = rf"expected a folder that no other run writes to, got .*process {child}"
        with pytest.raises(ValueError, match=match), begun(job, {"rows": 6}, anew):
            pass
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    with begun(job, {"rows": 6}) as missing:
        assert missing == []
    assert not lock.exists()


def test_nothing_is_left_of_a_run_that_is_forgotten(job: Job) -> None:
    """Staging folders of writers that died, before they had a lock or after, go with it."""
    with begun(job, {"rows": 6}):
        for place in (job.out, job.out / DONE):
            (place / f".a{STAGING}").mkdir()
            (place / f".b{STAGING}").mkdir()
            (place / f".b{STAGING}" / "lock").touch()
        forget(job)
    assert not job.out.exists()


class Endless(Numbers):
    """An input whose rows after the first two take ten minutes."""

    def encode(self, tokenizer: Any, numbers: range, how: Encoding, step: Callable[[int], None]) -> Any:
        step(len(numbers))
        time.sleep(600 if numbers.start else 0)
        return super().encode(tokenizer, numbers, how, step)


@pytest.mark.parametrize("end", [KeyboardInterrupt, ValueError, BrokenProcessPool])
def test_worker_processes_end_with_the_run(end: type[BaseException], tmp_path: Path) -> None:
    """At an interrupt, an error, or the death of one of them: at once, and not when their shards are done."""
    job = Job(Endless, Family, tmp_path / "out", "webdataset", 2, Encoding())
    begun_at, done, before = time.monotonic(), [], set(multiprocessing.active_children())

    def step(count: int) -> None:
        done.append(count)
        if sum(done) > 2:
            (worker,) = set(multiprocessing.active_children()) - before
            if end is not BrokenProcessPool:
                raise end
            worker.kill()

    with begun(job, {"rows": 6}) as missing, pytest.raises(end):
        run_processes(job, missing, 1, step)
    assert time.monotonic() - begun_at < 300
    assert finished(job, 0) is not None
    assert finished(job, 1) is None


def test_an_archive_of_numpy_with_an_odd_member(tmp_path: Path) -> None:
    for name, data in (("ids.npy", b"x"), ("ids.npy", b"\x93NUMPY\x01\x00v\x00{'descr': '|O'}"), ("metadata.npy", b"")):
        with zipfile.ZipFile(tmp_path / "a.npz", "w") as archive:
            archive.writestr(name, data)
        with pytest.raises(ValueError, match="expected"):
            list(read_codes(tmp_path / "a.npz"))


@pytest.mark.parametrize("order", ["C", "F"])
@pytest.mark.parametrize("dtype", ["<f4", ">f4", "<f8", "<f2"])
def test_arrays_of_other_programs_are_read_right(order: str, dtype: str, tmp_path: Path) -> None:
    """Either order of the axes, either order of the bytes: the same values, or a refusal."""
    values = np.arange(12, dtype=dtype).reshape(4, 3)
    stream = io.BytesIO()
    np.save(stream, np.asarray(values, order=order))  # pyright: ignore[reportArgumentType, reportCallIssue]
    facts = json.dumps({"height": 8, "width": 8, "rows": 2, "columns": 2}).encode()
    members = [("0.latents.npy", stream.getvalue()), ("0.json", facts)]
    (tmp_path / "a.tar").write_bytes(b"".join(header(name, len(data)) + padded(data) for name, data in members) + END)
    (row,) = read_shard(tmp_path / "a.tar")
    assert isinstance(row, CodesOfImage)
    assert row.values.tolist() == values.tolist()
    texts = np.array(json.dumps({key: str(value) for key, value in json.loads(facts).items()}))
    np.savez(tmp_path / "a.npz", latents=np.asarray(values[None], order=order), metadata=texts)  # pyright: ignore[reportArgumentType, reportCallIssue]
    read: list[Any] = []
    message = refusal(lambda: read.extend(read_codes(tmp_path / "a.npz")))
    assert (message is None) == (dtype[0] == "<")
    assert [row.values.tolist() for row in read] == ([] if message else [values.tolist()])
