"""Ids tell which tokenizer made them, and everything that reads them from files refuses those of another one."""

import copy
import io
import json
import re
import tarfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from benchmarks.tiny import tokenflow_config
from tokenizers_mm import load
from tokenizers_mm._origin import OriginCheck, read_origin
from tokenizers_mm.cli import main
from tokenizers_mm.data.codes import CodesOfImage, write_codes
from tokenizers_mm.data.token_shards import MANIFEST, TokenShards, read_shards
from tokenizers_mm.models import TokenFlow
from tokenizers_mm.types import ImageCodes

PARQUET = pytest.mark.skipif(find_spec("pyarrow") is None, reason="pyarrow is not installed")
OUTPUTS = ["ids.safetensors", "ids.npz", pytest.param("ids.parquet", marks=PARQUET), "tar",
           pytest.param("parquet", marks=PARQUET)]  # fmt: skip
NAME = r"tokenflow:[0-9a-f]{12}"
REFUSED = rf"expected ids of this tokenizer, {NAME}, got ids of {NAME} \(any_tokenizer=True, on the command line --any-"


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two tokenizers of one family and size, `a` and `b`, and two images."""
    place = tmp_path_factory.mktemp("origin")
    for seed, name in enumerate("ab"):
        torch.manual_seed(seed)
        TokenFlow.from_config(tokenflow_config()).save(place / name)
    (place / "images").mkdir()
    for index in range(2):
        levels = np.random.default_rng(index).integers(0, 256, (32, 32, 3), dtype=np.uint8)
        Image.fromarray(levels).save(place / "images" / f"{index}.png")
    row = {"id": 3, "content": [{"image": "images/0.png"}, {"text": "a"}]}
    (place / "rows.jsonl").write_text(json.dumps(row))
    return place


def made(place: Path, output: str, tmp_path: Path) -> Path:
    """Ids of the images by tokenizer `a`, as a kind of output."""
    out = tmp_path / output
    verb = ["encode"] if "." in output else ["tokenize", "--format", "webdataset" if output == "tar" else output]
    assert main([*verb, str(place / "images"), "--tokenizer", str(place / "a"), "--out", str(out)]) == 0
    return out


@contextmanager
def told(pattern: str) -> Iterator[None]:
    with pytest.warns(UserWarning, match=pattern) as caught:
        yield
    assert len(caught) == 1


@pytest.mark.parametrize("output", OUTPUTS)
def test_ids_of_another_tokenizer_are_not_decoded(
    place: Path, output: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ids = made(place, output, tmp_path)
    assert {row.origin for row in read_shards(ids)} == {load(place / "a").fingerprint()}  # type: ignore[union-attr]
    decode = ["decode", str(ids), "--out-dir", str(tmp_path / "out"), "--tokenizer"]
    assert main([*decode, str(place / "a")]) == 0
    capsys.readouterr()
    assert main([*decode, str(place / "b")]) == 2
    assert re.search(REFUSED, capsys.readouterr().err)
    assert main([*decode, str(place / "b"), "--any-tokenizer"]) == 0
    assert len(list((tmp_path / "out").iterdir())) == 2


def test_a_run_of_another_tokenizer_is_not_continued(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = made(place, "tar", tmp_path)
    again = ["tokenize", str(place / "images"), "--out", str(out), "--tokenizer"]
    assert main([*again, str(place / "b")]) == 2
    assert "got another tokenizer" in capsys.readouterr().err
    assert main([*again, str(place / "a")]) == 0


def old_file(path: Path, family: str) -> Path:
    write_codes(path, [CodesOfImage(torch.zeros(21, dtype=torch.int64), 32, 32, None)], family)
    return path


def old_tar(path: Path) -> Path:
    array = io.BytesIO()
    np.save(array, np.zeros(21, dtype=np.int64))
    facts = json.dumps({"height": 32, "width": 32, "tokenizer": ["no text"], "family": 7}).encode()
    with tarfile.open(path, "w") as archive:
        for name, data in (("0.ids.npy", array.getvalue()), ("0.json", facts)):
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    return path


def test_files_that_do_not_tell_are_decoded_with_a_sentence(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tokenizer = load(place / "a")
    assert tokenizer.num_ids(32, 32) == 21
    end = ["--tokenizer", str(place / "a"), "--out-dir", str(tmp_path / "out")]
    for ending in (".npz", ".safetensors"):
        with told("does not say which tokenflow tokenizer made its ids; they are taken for this one's"):
            assert main(["decode", str(old_file(tmp_path / f"old{ending}", "tokenflow")), *end]) == 0
    with told("does not say which tokenizer made its ids"):
        assert main(["decode", str(old_tar(tmp_path / "old.tar")), *end]) == 0
    capsys.readouterr()
    assert main(["decode", str(old_file(tmp_path / "other.npz", "vqgan")), *end]) == 2
    assert "expected ids of this tokenizer, tokenflow, got ids of vqgan (" in capsys.readouterr().err


def test_shards_for_training(place: Path, tmp_path: Path) -> None:
    out = made(place, "tar", tmp_path)
    a, b = load(place / "a"), load(place / "b")
    assert len(TokenShards(out, a)) == len(TokenShards(out, b, any_tokenizer=True)) == len(TokenShards(out)) == 2
    with pytest.raises(ValueError, match=REFUSED):
        TokenShards(out, b)
    manifest = json.loads((out / MANIFEST).read_text())
    assert manifest["tokenizer"] == a.fingerprint()
    (out / MANIFEST).write_text(json.dumps(manifest | {"tokenizer": "0" * 64}))  # of an older version
    with told("does not say which tokenflow tokenizer"):
        TokenShards(out, b)


def test_records_and_vocabularies(place: Path, tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    from tests.llm.fakes import byte_level
    from tokenizers_mm.llm import MultimodalProcessor, VisualVocabulary
    from tokenizers_mm.llm.records import Records

    a, b = load(place / "a"), load(place / "b")
    out = tmp_path / "records"
    assert main(["tokenize", str(place / "rows.jsonl"), "--tokenizer", str(place / "a"), "--out", str(out)]) == 0
    file = out / "part-00000.jsonl"
    mine, taken = (records[0][0].content for records in (Records(file, a), Records(file, b, any_tokenizer=True)))
    assert isinstance(mine, ImageCodes)
    assert isinstance(taken, ImageCodes)
    assert torch.equal(mine.ids, taken.ids)
    with pytest.raises(ValueError, match=REFUSED):
        Records(file, b)[0]
    row = json.loads(file.read_text())
    assert row["id"] == 3
    assert row["content"][0]["codes"].pop("tokenizer") == a.fingerprint()
    file.write_text((json.dumps(row) + "\n") * 2)
    records = Records(file, b)
    with told("does not say which tokenizer"):  # once for a file
        assert len([records[0], records[1]]) == 2

    text = byte_level()
    vocabulary = VisualVocabulary.for_tokenizer(a, text)
    MultimodalProcessor(a, text, vocabulary).save(tmp_path / "llm")
    found = VisualVocabulary.load(tmp_path / "llm")
    assert found.tokenizer == a.fingerprint()
    with pytest.raises(ValueError, match=REFUSED):
        MultimodalProcessor(b, text, found)
    with pytest.raises(ValueError, match=f"visual_vocab.json: {REFUSED}"):
        MultimodalProcessor.from_pretrained(tmp_path / "llm", b)
    processor = MultimodalProcessor.from_pretrained(tmp_path / "llm", b, any_tokenizer=True)
    processor.save(tmp_path / "other")  # from now on they are this one's
    assert VisualVocabulary.load(tmp_path / "other").tokenizer == b.fingerprint()
    vocabulary.save(tmp_path / "llm")
    with told("visual_vocab.json does not say which tokenizer"):
        MultimodalProcessor.from_pretrained(tmp_path / "llm", a)


def test_fingerprints(place: Path) -> None:
    tokenizer = load(place / "a")
    name = tokenizer.fingerprint()
    assert read_origin({"tokenizer": name}) == name == load(place / "a").fingerprint()
    for dtype in (torch.bfloat16, torch.float64):
        assert copy.deepcopy(tokenizer).to(dtype).fingerprint() == name
    parameter = next(iter(tokenizer.parameters()))
    kept = parameter.detach().clone()
    with torch.no_grad():
        parameter.flatten()[0].add_(1)
        assert tokenizer.fingerprint() != name
        parameter.copy_(kept)
    assert tokenizer.fingerprint() == name


@pytest.mark.parametrize("value", [None, 3, "", "a" * 65 + ":" + "0" * 32, "tokenflow:zz", "\x1b:" + "0" * 32, ["x"]])
def test_origins_of_anybody_tell_nothing(place: Path, value: Any) -> None:
    assert read_origin({"tokenizer": value, "family": value}) == ""
    check = OriginCheck(load(place / "a"))
    with told("does not say"):
        check("x", "")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check("x", "")
        OriginCheck(None, any_tokenizer=True)("x", "tokenflow:" + "0" * 32)
