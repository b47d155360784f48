"""A config.json that anybody may have written: every change of it loads or is refused with one sentence, at once."""

import dataclasses
import json
import os
import pickle
import resource
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import _SIZE as WRITABLE_DTYPES
from safetensors.torch import load_file, save_file

import tokenizers_mm as tmm
from benchmarks.tiny import dualvitok_config, tokenflow_config
from benchmarks.tiny import semantic as semantic_model
from benchmarks.tiny import vqgan_config as vqgan_config
from tests.mar_cases import tiny_config as mar_config
from tokenizers_mm.cli import main
from tokenizers_mm.encoders.semantic import SemanticEncoder, SemanticEncoderConfig
from tokenizers_mm.models import MAR, VQGAN, DualViTok, TokenFlow

FAMILIES: dict[str, Callable[[], Any]] = {
    "dualvitok": lambda: DualViTok.from_config(dualvitok_config()),
    "mar": lambda: MAR.from_config(mar_config()),
    "semantic": lambda: semantic_model(semantic_decoder={"kind": "transformer", "width": 16, "depth": 1, "heads": 2}),
    "tokenflow": lambda: TokenFlow.from_config(tokenflow_config()),
    "vqgan": lambda: VQGAN.from_config(vqgan_config()),
}
SECONDS = 5.0


class Raw(str):
    """Text that is written into the JSON as it is."""


VALUES: list[Any] = [
    *(None, True, "", "x", "NaN", "../../x", "hf-hub:owner/name", "x" * 70_000, "\x1b[2J", "\ud800"),
    *(0, -1, 1, 3, 0.5, -0.0, 1e-300, 10**6, 2**31, 10**12, 2**63, Raw("1" * 5000), Raw("1e999"), Raw("-Infinity")),
    *([], {}, [1, 2, 3], [[1]], {"a": 1}, {"kind": []}, Raw("[" * 20_000 + "]" * 20_000), [1] * 100_001),
]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("saved")
    for name, make in FAMILIES.items():
        make().save(folder / name)
    return {name: folder / name for name in FAMILIES}


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The paths of all values of a JSON document, containers before what they hold."""
    yield path
    for key, item in value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ():
        yield from places(item, (*path, key))


def put(document: Any, path: tuple[Any, ...], change: Callable[[Any, Any], Any]) -> Any:
    """A copy of a document after change(container, key)."""
    copy = json.loads(json.dumps(document))
    inner = copy
    for key in path[:-1]:
        inner = inner[key]
    change(inner, path[-1])
    return copy


def mutations(document: dict[str, Any]) -> Iterator[Any]:
    """All changes of single places: another value, one less, one more, two swapped."""
    paths = [path for path in places(document) if path]
    for index, path in enumerate(paths):
        for value in VALUES:
            yield put(document, path, lambda inner, key, value=value: inner.__setitem__(key, value))
        yield put(document, path, lambda inner, key: inner.__delitem__(key))
        yield put(
            document, path, lambda inner, key: inner.update(extra=1) if isinstance(inner, dict) else inner.append(1)
        )
        other = paths[(index * 7 + 1) % len(paths)]
        value = document
        for key in other:
            value = value[key]
        yield put(document, path, lambda inner, key, value=value: inner.__setitem__(key, value))
    yield from ([], 3, None, "text", Raw("{"), Raw(""), Raw("nan"), Raw('{"a": 1, '), Raw("[" * 200_000))


def text(value: Any) -> str:
    """JSON in which `Raw` stands as it is."""
    parts: list[str] = []

    def mark(item: Any) -> Any:
        if isinstance(item, Raw):
            parts.append(item)
            return f"@raw{len(parts) - 1}@"
        if isinstance(item, dict):
            return {key: mark(inner) for key, inner in item.items()}
        return [mark(inner) for inner in item] if isinstance(item, list) else item

    written = json.dumps(mark(value))
    for index, part in enumerate(parts):
        written = written.replace(f'"@raw{index}@"', part)
    return written


def outcome(folder: Path, capsys: pytest.CaptureFixture[str]) -> str:
    """Outcome of reading a folder, twice: "loads" or "refused". Anything else is an error of the test."""
    begin = time.process_time()  # a busy machine must not change the result
    refusal: ValueError | None = None
    try:
        tmm.load(folder)
    except ValueError as error:
        refusal = error
    code = main(["info", str(folder)])
    seconds = time.process_time() - begin
    captured = capsys.readouterr()
    assert code == (0 if refusal is None else 2)
    assert captured.err.count("\n") == code // 2, captured.err
    assert seconds < 2 * SECONDS, seconds
    if refusal is None:
        return "loads"
    message = str(refusal)
    assert type(refusal) is ValueError, repr(refusal)
    assert "expected" in message or "unknown key" in message, message
    assert "\n" not in message, message
    assert len(message) < 4000, message[:4000]
    return "refused"


def run(folder: Path, step: int, first: int, capsys: pytest.CaptureFixture[str]) -> dict[str, int]:
    """Try every `step`-th change of a saved tokenizer's config.json; how many load and how many are refused."""
    file = folder / "config.json"
    whole = file.read_text()
    counts = {"loads": 0, "refused": 0}
    try:
        for index, change in enumerate(mutations(json.loads(whole))):
            if index % step == first % step:
                file.write_text(text(change), encoding="utf-8")
                try:
                    counts[outcome(folder, capsys)] += 1
                except Exception as error:
                    raise AssertionError(f"change {index} of {folder.name}: {text(change)[:3000]}") from error
    finally:
        file.write_text(whole)
    return counts


@pytest.mark.parametrize("family", FAMILIES)
def test_changed_configs_load_or_are_refused(
    family: str, saved: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    counts = run(saved[family], 31, 5, capsys)
    assert counts["refused"] > 20
    assert outcome(saved[family], capsys) == "loads"


@pytest.mark.full
def test_two_thousand_changed_configs_load_or_are_refused(
    saved: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    counts = {family: run(saved[family], 5, 0, capsys) for family in FAMILIES}
    with capsys.disabled():
        print(f"\n{counts}")
    assert sum(sum(count.values()) for count in counts.values()) >= 2000


class Harm:
    """Effect of unpickling that must never happen: it makes a file."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.marker,)


def edited(folder: Path, **changes: Any) -> dict[str, Any]:
    """Change the semantic encoder of a saved TokenFlow; the whole config.json."""
    document = json.loads((folder / "config.json").read_text())
    document["config"]["semantic_encoder"] |= changes
    (folder / "config.json").write_text(json.dumps(document))
    return document


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: Any) -> None:
        raise AssertionError("reached for the network")

    for name in ("connect", "connect_ex"):
        monkeypatch.setattr(socket.socket, name, refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


SIZES = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 1, "num_heads": 2}


@pytest.mark.usefixtures("no_network")
def test_no_option_of_a_config_names_a_file_or_an_address(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, marker = tmp_path / "tokenizer", tmp_path / "harm"
    FAMILIES["tokenflow"]().save(folder)
    pickled = folder / "tower.pth"
    pickled.write_bytes(pickle.dumps({"state_dict": Harm(marker)}, protocol=2))
    monkeypatch.chdir(folder)
    overlay = {"file": str(pickled), "source": "file", "custom_load": True}
    for option in (
        *({"checkpoint_path": str(pickled)}, {"checkpoint_path": "tower.pth"}, {"cache_dir": str(tmp_path)}),
        *({"pretrained_cfg": overlay}, {"pretrained_cfg_overlay": overlay}, {"pretrained": True}, {"scriptable": True}),
        *({"features_only": True}, {"embed_layer": "os.system"}, {"norm_layer": "x"}, {"act_layer": "os.system"}),
    ):
        edited(folder, options={**SIZES, **option})
        assert outcome(folder, capsys) == "refused"
        with pytest.raises(ValueError, match=r"options|unknown key"):
            SemanticEncoder(SemanticEncoderConfig("vit_tiny_patch16_224", {**SIZES, **option}))
    for name in (
        *("hf-hub:owner/name", "hf_hub:owner/name", "local-dir:.", f"local-dir:{folder}", "timm/vit_tiny_patch16_224"),
        *("https://example.com/x", "../x", "vit_tiny_patch16_224/../x", "vit_tiny_patch16_224.a.b", "VIT_tiny", "none"),
    ):
        edited(folder, name=name, options=SIZES)
        assert outcome(folder, capsys) == "refused"
    for changes in ({"pretrained": True}, {"name": "vit_tiny_patch16_224.augreg_in21k"}):
        edited(folder, **{"name": "vit_tiny_patch16_224", **changes})
        assert outcome(folder, capsys) == "loads"
    assert not marker.exists()


@pytest.mark.parametrize(
    "change",
    [
        {"quantizer": {"codebook_size": 1 << 26, "dims": [64, 8], "weights": [1.0, 1.0]}},
        {"semantic_decoder": {"grid": [4, 4], "out_dim": 1 << 16, "width": 1 << 16, "depth": 256, "heads": 2}},
        {"semantic_decoder": {"grid": [4, 4], "out_dim": 24, "width": 32, "depth": 1_000_000, "heads": 2}},
    ],
)
def test_a_config_cannot_ask_for_more_memory_than_its_weights_file_holds(
    change: dict[str, Any], saved: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "tokenizer"
    tmm.load(saved["tokenflow"]).save(folder)
    document = json.loads((folder / "config.json").read_text())
    document["config"] |= change
    (folder / "config.json").write_text(json.dumps(document))
    with address_space(1 << 30):
        assert outcome(folder, capsys) == "refused"


def test_a_new_model_that_memory_cannot_hold_is_refused_before_it_is_built() -> None:
    config = tokenflow_config()
    decoder = dataclasses.replace(config.semantic_decoder, width=1 << 16, depth=256)
    with (
        address_space(1 << 30),
        pytest.raises(ValueError, match=r"config: expected weights within the [\d,]+ byt"),
    ):
        TokenFlow.from_config(dataclasses.replace(config, semantic_decoder=decoder))


@contextmanager
def address_space(more: int) -> Iterator[None]:
    """Let this process take only `more` bytes beyond what it has mapped now (where the system can say and do so)."""
    status = Path("/proc/self/statm")
    if not status.exists():
        yield
        return
    now = int(status.read_text().split()[0]) * resource.getpagesize()
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (now + more, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


def test_weights_of_several_dtypes_become_float32(saved: dict[str, Path], tmp_path: Path) -> None:
    folder = tmp_path / "tokenizer"
    tokenizer = tmm.load(saved["mar"])
    tokenizer.save(folder)
    file = folder / "model.safetensors"
    whole = {name: t.clone() for name, t in load_file(file).items()}  # not the file, which is written over
    names = sorted(whole)
    for dtypes, result in [
        ((torch.float32, torch.bfloat16, torch.float16), torch.float32),
        ((torch.bfloat16, torch.float16), torch.float32),
        ((torch.bfloat16,), torch.bfloat16),
        ((torch.float16,), torch.float16),
    ]:
        save_file({name: whole[name].to(dtypes[i % len(dtypes)]) for i, name in enumerate(names)}, file)
        loaded = tmm.load(folder)
        assert {p.dtype for p in loaded.state_dict().values()} == {result}
    for dtype in (torch.int8, torch.uint8, torch.int64, torch.bool, torch.float8_e4m3fn, torch.complex64):
        if dtype not in WRITABLE_DTYPES:  # complex64 in safetensors before 0.7
            continue
        save_file({**whole, names[3]: whole[names[3]].to(dtype)}, file)
        with pytest.raises(ValueError, match=rf"{names[3]}: expected float32 or bfloat16 .*, got {str(dtype)[6:]}"):
            tmm.load(folder)


def test_buffers_that_no_file_holds_are_computed(tmp_path: Path) -> None:
    config = tokenflow_config()
    tower = SemanticEncoderConfig("eva02_tiny_patch14_224", {**SIZES, "patch_size": 8, "num_heads": 2})
    tokenizer = TokenFlow.from_config(dataclasses.replace(config, semantic_encoder=tower)).eval()
    kept = set(tokenizer.state_dict())
    assert any(name not in kept for name, _ in tokenizer.named_buffers())
    tokenizer.save(tmp_path / "tokenizer")
    x = torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
    loaded = tmm.load(tmp_path / "tokenizer")
    assert not any(buffer.is_meta for buffer in loaded.buffers())
    assert torch.equal(loaded.encode(x).ids, tokenizer.encode(x).ids)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_a_fifo_in_place_of_a_file_is_refused(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    FAMILIES["mar"]().save(tmp_path / "tokenizer")
    (tmp_path / "tokenizer" / name).unlink()
    os.mkfifo(tmp_path / "tokenizer" / name)
    assert outcome(tmp_path / "tokenizer", capsys) == "refused"
    with pytest.raises(ValueError, match="got a FIFO"):
        tmm.load(tmp_path / "tokenizer")
