"""A tokenizer goes to a stand-in of the hub and comes back; the card says bits, protocol and licence."""

import json
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import yaml

import tokenizers_mm as tmm
from benchmarks.tiny import dualvitok_config as tiny_dualvitok_config
from benchmarks.tiny import tokenflow_config as tiny_config
from tests.hub import Hub, running_hub
from tests.mar_cases import tiny_config as tiny_mar_config
from tokenizers_mm.cli import main
from tokenizers_mm.models import MAR, DualViTok, Provenance, TokenFlow
from tokenizers_mm.models.card import bits_per_image, card, measurements
from tokenizers_mm.models.publishing import push

REPORT = {
    "protocol": {"name": "default", "fit": "crop", "hash": "a | b"},
    "images": {"source": "photos", "count": 3, "skipped": ["a | b"] * 20},
    "tokenizers": [
        {
            "name": "tok",
            "metrics": {
                "psnr": {"mean": 21.53125, "low": 20.0, "high": 22.5},
                "bits": {"mean": 126.0, "low": 126.0, "high": 126.0},
                "rfid": {"mean": None, "low": None, "high": None},
            },
            "codebook": {"shared": {"usage": 0.5}},
        },
    ],
}
FILES = {
    *("config.json", "model.safetensors", "preprocessor_config.json", "README.md", "app.py", "requirements.txt"),
}


@pytest.fixture(scope="module")
def tokenizer() -> TokenFlow:
    torch.manual_seed(0)
    return TokenFlow.from_config(tiny_config()).eval()


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Hub]:
    """A hub that huggingface_hub takes for its own, with a cache of this test's."""
    constants = pytest.importorskip("huggingface_hub").constants
    with running_hub() as found:
        template = found.endpoint + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "ENDPOINT", found.endpoint)
        for place in ("constants", "file_download"):  # before version 1, the latter keeps a copy
            name = f"huggingface_hub.{place}.HUGGINGFACE_CO_URL_TEMPLATE"
            monkeypatch.setattr(name, template, raising=False)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_PROGRESS_BARS", True)
        yield found


def test_there_and_back(tokenizer: TokenFlow, hub: Hub) -> None:
    address = tokenizer.push_to_hub("me/tok", private=True, token="secret", report=REPORT, commit_message="First")
    assert address == f"{hub.endpoint}/me/tok/commit/{'1'.zfill(40)}"
    assert set(hub.repositories["models/me/tok"]) - {".gitattributes"} == FILES
    assert hub.created[0]["visibility" if "visibility" in hub.created[0] else "private"] in (True, "private")
    assert hub.commits[0]["summary"] == "First"
    assert hub.tokens == {"Bearer secret"}
    loaded = tmm.load("me/tok")
    for name, tensor in tokenizer.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor), name


def test_the_command(tokenizer: TokenFlow, hub: Hub, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tokenizer.save(tmp_path / "run" / "tokenizer")
    where = str(tmp_path / "run" / "tokenizer")
    evaluated = f"eval {where} --images scenes --limit 2 --metrics psnr --out {tmp_path / 'run'}"
    assert main(evaluated.split()) == 0
    capsys.readouterr()
    assert main(["push", where, "me/tok", "--license", "mit", "--space", "me/show"]) == 0
    said = capsys.readouterr()
    assert "measurements of" in said.out
    assert said.err == ""
    assert set(hub.repositories["spaces/me/show"]) == {"app.py", "requirements.txt", "README.md"}
    assert hub.created[1]["sdk"] == "gradio"
    text = hub.repositories["models/me/tok"]["README.md"].decode()
    assert "license: mit" in text
    (row,) = json.loads((tmp_path / "run" / "report.json").read_text())["tokenizers"]
    assert f"| psnr | {row['metrics']['psnr']['mean']:.4g} (" in text
    assert main(["push", "me/tok", "--out", str(tmp_path / "files"), str(tmp_path / "run" / "tokenizer")]) == 2, "order"
    assert main(["push", "--out", str(tmp_path / "files"), where, "me/tok"]) == 0
    assert "no licence is stated" in capsys.readouterr().err
    assert {path.name for path in (tmp_path / "files").iterdir()} == FILES


def test_offline_and_refused_are_one_sentence(
    tokenizer: TokenFlow, hub: Hub, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer.save(tmp_path / "tok")
    hub.readonly = True
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        closed = f"http://127.0.0.1:{probe.getsockname()[1]}"
    assert main(["push", str(tmp_path / "tok"), "me/tok", "--license", "mit"]) == 2
    refused = capsys.readouterr().err
    monkeypatch.setattr(pytest.importorskip("huggingface_hub").constants, "ENDPOINT", closed)
    assert main(["push", str(tmp_path / "tok"), "me/tok", "--license", "mit"]) == 2
    offline = capsys.readouterr().err
    for said in (refused, offline):
        assert said.startswith("tokenizers-mm push: repo: expected a hub that can be reached and a repository")
        assert len(said.splitlines()) == 1
    assert "403" in refused
    for name in ("", "a/b/c", "me/tok; x", "me/ tok", '"me/tok'):
        with pytest.raises(ValueError, match="repo: expected a name such as owner/name"):
            push(tokenizer, name)


def test_the_app_runs_what_it_says(tokenizer: TokenFlow, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its function, with a stand-in of gradio that keeps what it is given."""
    import sys
    import types

    from PIL import Image

    from tokenizers_mm.models.publishing import save

    kept: dict[str, object] = {}

    class Interface:
        def __init__(self, function: object, *_: object, **options: object) -> None:
            kept.update(options, function=function)

        def launch(self) -> None:
            kept["launched"] = True

    gradio = types.ModuleType("gradio")
    gradio.Interface, gradio.Image, gradio.Textbox = Interface, dict, dict  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "gradio", gradio)
    save(tokenizer, tmp_path, license="mit")
    assert tokenizer.provenance.license == ""
    monkeypatch.chdir(tmp_path)
    exec(compile((tmp_path / "app.py").read_text(), "app.py", "exec"), {})
    image, said = kept["function"](Image.new("RGB", (50, 40), "red"))  # type: ignore[operator]
    assert image.size == (32, 32)
    assert said.startswith("ImageCodes(1 of 32x32")
    assert kept["launched"]


def header(text: str) -> dict[str, object]:
    """The YAML between the first two lines of dashes."""
    return yaml.safe_load(text.split("---\n")[1])


@pytest.mark.parametrize(
    ("license", "expected"),
    [
        ("Apache-2.0", {"license": "apache-2.0"}),
        ("", {}),
        ('S-Lab "1.0", non-commercial: yes', {"license": "other", "license_name": "S-Lab '1.0', non-commercial: yes"}),
        ("a\x07\nlicense: mit\n---\n", {"license": "other", "license_name": "a/x07 license: mit ---"}),
        ("\ud800", {"license": "other", "license_name": "/ud800"}),
    ],
)
def test_the_header_has_the_licence(tokenizer: TokenFlow, license: str, expected: dict[str, str]) -> None:
    tokenizer.provenance = Provenance(license=license)
    found = header(card(tokenizer))
    tokenizer.provenance = Provenance()
    assert {name: value for name, value in found.items() if name.startswith("license")} == expected
    assert found["tags"] == ["image-tokenizer"]


def test_a_notice_of_anybody_stays_one_item_of_the_card(tokenizer: TokenFlow) -> None:
    tokenizer.provenance = Provenance(source="a\n# b", notice="c\n---\n<script>\x1b")
    lines = card(tokenizer).splitlines()
    tokenizer.provenance = Provenance()
    assert "- Source: a # b" in lines
    assert "- Notice: c --- <script>\\x1b" in lines


def test_bits_come_first_and_the_protocol_is_inside(tokenizer: TokenFlow) -> None:
    text = card(tokenizer, REPORT)
    assert "**126 bits per image** of 32 x 32 pixels (0.123 bits per pixel)" in text  # 21 ids of 6 bits
    rows = [line for line in text.splitlines() if line.startswith("| ")][1:]
    assert rows == ["| bits | 126 |", "| psnr | 21.53 (20 to 22.5) |", "| rfid | - |"]
    assert "## Measured on 3 images (photos)" in text
    assert "- fit: crop" in text
    assert "- hash: a \\| b" in text


def test_a_report_is_of_this_tokenizer() -> None:
    two = REPORT | {"tokenizers": [*REPORT["tokenizers"], {"name": "other", "metrics": {}}]}  # type: ignore[misc]
    assert [row["name"] for row in measurements(two, "other")["tokenizers"]] == ["other"]
    assert measurements({"psnr": 1.0, "report": REPORT})["tokenizers"] == REPORT["tokenizers"]
    with pytest.raises(ValueError, match="report: expected one of mine, got tok, other"):
        measurements(two, "mine")
    for other in ({}, {"tokenizers": []}, {"tokenizers": [3]}, {"report": 3}):
        with pytest.raises(ValueError, match="report: expected a report of tokenizers-mm eval, got another file"):
            measurements(other)


def test_bits_of_other_kinds() -> None:
    tokenizer = DualViTok.from_config(tiny_dualvitok_config())
    found = bits_per_image(tokenizer)
    assert found is not None
    bits, size = found
    streams = tokenizer.streams(*size)
    expected = sum(torch.tensor(s.codebook_size).log2().item() * s.num_ids for s in streams)
    assert bits == pytest.approx(expected)
    assert bits_per_image(MAR.from_config(tiny_mar_config())) is None
    assert "Continuous latents" in card(MAR.from_config(tiny_mar_config()))
