"""Checkpoints that anybody may have written: read right, or refused with one sentence before memory is taken."""

import os
import pickle
import random
import struct
import time
import zipfile
from collections import Counter, OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.models.test_untrusted_configs import address_space
from tokenizers_mm.checkpoints.convert import convert
from tokenizers_mm.checkpoints.upstream import link, read, take

TENSORS = {
    "a": torch.arange(1000.0),
    "b": torch.arange(50) + 7,
    "c": torch.rand(3, 300, generator=torch.Generator().manual_seed(0)).t(),
    "d": torch.arange(64.0).to(torch.bfloat16),
    "e": torch.zeros(0),
}


def rewrite(
    source: Path, target: Path, compression: int, trailing: int = 0, edit: Callable[[str, bytes], bytes] | None = None
) -> Path:
    """The archive of `torch.save` as another program would write it."""
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(target, "w", compression) as new:
        for name in old.namelist():
            data = old.read(name)
            new.writestr(name, data if edit is None else edit(name, data))
        if trailing:
            new.writestr(f"{old.namelist()[0].split('/')[0]}/notes", random.Random(0).randbytes(trailing))
    return target


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    torch.save(TENSORS, tmp_path / "saved.pt")
    return tmp_path / "saved.pt"


@pytest.mark.parametrize("trailing", [0, 1 << 20])
@pytest.mark.parametrize("compression", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2])
def test_archives_of_other_programs_are_read_right(
    compression: int, trailing: int, saved: Path, tmp_path: Path
) -> None:
    file = rewrite(saved, tmp_path / "other.pt", compression, trailing)
    with zipfile.ZipFile(file) as archive:
        assert {info.compress_type for info in archive.infolist()} == {compression}
    tensors = read(file)
    assert tensors.keys() == TENSORS.keys()
    for name, tensor in TENSORS.items():
        assert tensors[name].dtype == tensor.dtype
        assert torch.equal(tensors[name], tensor), name
        assert tensors[name].data_ptr() % tensor.element_size() == 0


def replace(old: bytes, new: bytes, count: int = -1) -> Callable[[str, bytes], bytes]:
    def edit(name: str, data: bytes) -> bytes:
        if not name.endswith("data.pkl"):
            return data
        assert old in data
        return data.replace(old, new, count)

    return edit


THOUSAND = b"M" + struct.pack("<H", 1000)
HUGE = b"\x8a\x08" + struct.pack("<q", 5_000_000_000)
MORE = b"M" + struct.pack("<H", 1024)


@pytest.mark.parametrize("compression", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
@pytest.mark.parametrize("new", [HUGE, MORE])
@pytest.mark.parametrize("count", [1, -1])
def test_sizes_that_the_file_does_not_hold_are_refused(
    compression: int, new: bytes, count: int, saved: Path, tmp_path: Path
) -> None:
    """The first number in the pickle is the size of the storage, the second that of the tensor."""
    file = rewrite(saved, tmp_path / "other.pt", compression, 1 << 16, replace(THOUSAND, new, count))
    with address_space(1 << 30), pytest.raises(ValueError, match=r"other\.pt.*expected .*, got ") as raised:
        read(file)
    assert "\n" not in str(raised.value)


def test_a_tensor_that_repeats_one_number_is_refused(tmp_path: Path) -> None:
    torch.save({"a": torch.zeros(1).expand(5_000_000_000)}, tmp_path / "a.pt")
    with pytest.raises(ValueError, match=r"a\.pt: a: expected 20000000000 bytes for its shape, got 4"):
        read(tmp_path / "a.pt")
    whole = torch.rand(1000)
    torch.save({f"n{i}": whole for i in range(5)}, tmp_path / "b.pt")
    with pytest.raises(ValueError, match="expected tensors with bytes of their own"):
        read(tmp_path / "b.pt")
    torch.save({"tied": whole, "head": whole, "part": whole[10:20]}, tmp_path / "c.pt")
    assert torch.equal(read(tmp_path / "c.pt")["part"], whole[10:20])


def test_a_small_file_that_unpacks_to_a_large_one_is_refused(saved: Path, tmp_path: Path) -> None:
    def zeros(name: str, data: bytes) -> bytes:
        return bytes(1 << 27) if name.endswith("/0") else data

    file = rewrite(saved, tmp_path / "bomb.pt", zipfile.ZIP_DEFLATED, 0, zeros)
    assert file.stat().st_size < 1 << 18
    with pytest.raises(ValueError, match=r"bomb\.pt: .*bytes when unpacked, got 134"):
        read(file)
    with zipfile.ZipFile(saved) as archive:
        name = archive.namelist()[0]
    with pytest.warns(UserWarning, match="Duplicate name"), zipfile.ZipFile(saved, "a") as archive:
        archive.writestr(name, b"other")
    with pytest.raises(ValueError, match="expected different names"):
        read(saved)


VALUES: dict[str, Callable[[], Any]] = {
    "sparse": lambda: torch.zeros(3).to_sparse(),
    "quantized": lambda: torch.quantize_per_tensor(torch.zeros(3), 0.1, 0, torch.qint8),
    "meta": lambda: torch.empty(3, device="meta"),
    "mapping": lambda: {"inner": torch.zeros(3)},
    "list": lambda: [torch.zeros(3)],
    "none": lambda: None,
}


@pytest.mark.parametrize("kind", VALUES)
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_what_is_no_plain_tensor_is_refused(kind: str, tmp_path: Path) -> None:
    torch.save({"a": torch.zeros(2), "b": VALUES[kind]()}, tmp_path / "a.pt")
    with pytest.raises(ValueError, match=r"a\.pt: expected .*, got ") as raised:
        read(tmp_path / "a.pt")
    assert "\n" not in str(raised.value)


def test_numbers_of_eight_bits_are_refused_by_name() -> None:
    links = link({"ours": (4,)}, [("^ours$", "theirs")])
    take(links, {"theirs": torch.zeros(4, dtype=torch.float16)}, "file")
    with pytest.raises(ValueError, match="theirs: expected float32, bfloat16, float16 or float64, got float8_e4m3fn"):
        take(links, {"theirs": torch.zeros(4).to(torch.float8_e4m3fn)}, "file")


@pytest.mark.parametrize("how", ["archive", "compressed", "legacy", "safetensors"])
def test_damaged_files_are_read_or_refused(how: str, tmp_path: Path) -> None:
    """Bytes changed, cut and inserted: never another exception than the one ValueError, and never much memory."""
    from safetensors.torch import save_file

    plain = {name: tensor.contiguous() for name, tensor in TENSORS.items()}
    good, bad = tmp_path / f"good.{'safetensors' if how == 'safetensors' else 'pt'}", tmp_path / "bad"
    if how == "safetensors":
        save_file(plain, good)
    else:
        torch.save(plain, good, _use_new_zipfile_serialization=how != "legacy")
    if how == "compressed":
        good = rewrite(good, tmp_path / "compressed.pt", zipfile.ZIP_DEFLATED)
    whole, draw = good.read_bytes(), random.Random(how)
    bad = bad.with_suffix(good.suffix)
    refused = 0
    with address_space(2 << 30):
        for _ in range(250):
            data = bytearray(whole)
            for _ in range(draw.choice([1, 1, 2, 8])):
                place = draw.choice([draw.randrange(len(data)), draw.randrange(min(900, len(data)))])
                kind = draw.randrange(4)
                if kind == 0:
                    data[place] = draw.randrange(256)
                elif kind == 1:
                    data[place] ^= 1 << draw.randrange(8)
                elif kind == 2:
                    del data[place : place + draw.choice([1, 8, 500])]
                else:
                    data[place:place] = draw.randbytes(draw.choice([1, 8]))
                data = data or bytearray(b"x")
            bad.write_bytes(data)
            try:
                tensors = read(bad)
                assert all(isinstance(tensor, Tensor) for tensor in tensors.values())
            except ValueError as error:
                refused += 1
                message = str(error)
                assert "\n" not in message
    assert refused > 20


def test_a_pickle_that_is_no_mapping_of_text_is_refused(tmp_path: Path) -> None:
    for value in (
        {("x",): torch.zeros(1)},
        {1: torch.zeros(1)},
        [torch.zeros(1)],
        torch.zeros(1),
        3,
        {"a": ("x", "y")},
    ):
        torch.save(value, tmp_path / "a.pt")
        with pytest.raises(ValueError, match="expected named tensors, got") as raised:
            read(tmp_path / "a.pt")
        assert len(str(raised.value)) < 1000
    (tmp_path / "b.pt").write_bytes(pickle.dumps({"a": 1}, protocol=2))
    with pytest.raises(ValueError, match="expected"):
        read(tmp_path / "b.pt")


def nested(levels: int) -> Any:
    """A tuple of 2 ** levels texts, each tuple in it twice the one before."""
    value: Any = "x"
    for _ in range(levels):
        value = (value, value)
    return value


class AsKey:
    """A value whose pickle computes the hash of a tuple."""

    def __init__(self, kind: type) -> None:
        self.kind = kind

    def __reduce__(self) -> tuple[Any, ...]:
        inner = nested(60)
        return self.kind, ([(inner, 1)] if self.kind is OrderedDict else [inner],)


@pytest.mark.parametrize("archive", [True, False])
@pytest.mark.parametrize("kind", ["value", "key", "ordered", "counter", "nested"])
def test_tuples_that_are_endless_when_written_out_are_refused_at_once(kind: str, archive: bool, tmp_path: Path) -> None:
    class Key:
        """Writes a mapping whose key is such a tuple; making it here would never end."""

        def __reduce__(self) -> tuple[Any, ...]:
            return dict, (), None, None, iter([(nested(60), 1)])

    class Nested:
        def __reduce__(self) -> tuple[Any, ...]:
            return OrderedDict, ([(nested(3), nested(60))],)

    values: dict[str, Any] = {"value": nested(60), "key": Key(), "nested": Nested()}
    values |= {"ordered": AsKey(OrderedDict), "counter": AsKey(Counter)}
    torch.save({"a": torch.zeros(2), "b": values[kind]}, tmp_path / "a.pt", _use_new_zipfile_serialization=archive)
    begin = time.process_time()
    with pytest.raises(ValueError, match=r"a\.pt: expected a whole file of torch.save, got .*tuples: expected at most"):
        read(tmp_path / "a.pt")
    assert time.process_time() - begin < 2
    torch.save({"a": torch.zeros(2)}, tmp_path / "b.pt", _use_new_zipfile_serialization=archive)
    assert read(tmp_path / "b.pt")["a"].shape == (2,)


def test_special_files_are_refused_and_not_waited_for(tmp_path: Path) -> None:
    for suffix in (".pt", ".safetensors"):
        os.mkfifo(tmp_path / f"fifo{suffix}")
        with pytest.raises(ValueError, match=r"got a (FIFO|device)"):
            read(tmp_path / f"fifo{suffix}")
    with pytest.raises(ValueError, match=r"got a (FIFO|device)"):
        read("/dev/zero")


SIZES: dict[str, Any] = {
    "vq_model": {"config": {"pixel_encoder": {"ch_mult": 3}}},
    "vit_config": {"depth": "x"},
    "dims": {"image_size": 1e9, "clip": [1], "pixel_encoder": {"ch": None}},
    "model_args": [],
    "scales": {"a": 1},
    "mar": 7,
}


@pytest.mark.parametrize("family", ["dualvitok", "mar", "tokenflow"])
def test_descriptions_of_any_type_get_one_sentence(family: str, saved: Path, tmp_path: Path) -> None:
    descriptions: list[Any] = [SIZES, [], 3, "x", {"mar": [1]}, {"dims": 1}, {"vq_model": {"config": 1}}, {"a": {1: 2}}]
    descriptions += [{**SIZES, "model_args": {"teacher": teacher}} for teacher in ([], "clipb_224", "siglip_384", None)]
    for description in descriptions:
        with pytest.raises(ValueError, match="expected"):
            convert(family, saved, tmp_path / "out", description)
