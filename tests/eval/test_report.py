"""The report: everything to repeat it, one protocol per table, and a page that needs no network."""

import io
import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch

from benchmarks.tiny import tokenflow_config as tiny_config
from tokenizers_mm.cli import main
from tokenizers_mm.cli.eval import progress_line
from tokenizers_mm.data.photographs import fixed_crops
from tokenizers_mm.eval import METRICS
from tokenizers_mm.eval.page import make_page
from tokenizers_mm.eval.report import as_markdown, join_reports, read_report, table
from tokenizers_mm.models.tokenflow import TokenFlow

QUICK = "bits,bits_per_pixel,psnr,ssim,codebook"


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("eval")
    for seed in (0, 1):
        torch.manual_seed(seed)
        TokenFlow.from_config(tiny_config()).save(folder / f"tok{seed}")
    for label in ("one", "two"):
        (folder / "images" / label).mkdir(parents=True)
    for index, crop in enumerate(fixed_crops("heldout", 14, 32)):
        crop.save(folder / "images" / ("one" if index % 2 else "two") / f"{index:02d} <b>.png")
    (folder / "images" / "one" / "bad.png").write_bytes(b"junk")
    return folder


@pytest.fixture(scope="module")
def report(place: Path) -> Path:
    out = place / "report"
    names = [str(place / "tok0"), str(place / "tok1"), "jpeg@match", "jpeg@curve"]
    arguments = ["--images", str(place / "images"), "--metrics", QUICK + ",knn", "--out", str(out)]
    assert main(["eval", *names, *arguments]) == 0
    return out


def test_the_report_says_how_to_repeat_it(report: Path, place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert sorted(path.name for path in report.iterdir()) == ["report.html", "report.json"]
    data = json.loads((report / "report.json").read_text())
    assert data["protocol"]["name"] == "default"
    assert len(data["protocol"]["hash"]) == 16
    assert data["images"]["count"] == 14
    assert "bad.png" in data["images"]["skipped"][0]
    assert {"torch", "pillow", "python", "tokenizers_mm"} <= set(data["versions"])
    first, second, codec, *curve = data["tokenizers"]
    assert (first["name"], second["name"], codec["name"]) == ("tok0", "tok1", "jpeg at equal bits")
    assert len({first["identity"], second["identity"]}) == 2
    assert all(row["on_curve"] for row in curve)
    assert first["metrics"]["psnr"]["low"] < first["metrics"]["psnr"]["mean"] < first["metrics"]["psnr"]["high"]
    assert first["metrics"]["knn"]["mean"] >= 0
    assert "knn" in codec["missing"]
    assert first["codebook"]["shared"]["bits"]["nominal"] == 21 * 6
    assert {frozenset((pair["a"], pair["b"])) for pair in data["pairs"]} == {
        frozenset(("tok0", "tok1")),
        frozenset(("tok0", "jpeg at equal bits")),
        frozenset(("tok1", "jpeg at equal bits")),
    }
    out = place / "again.json"
    arguments = ["--images", str(place / "images"), "--metrics", QUICK + ",knn", "--out", str(out)]
    assert main(["eval", str(place / "tok0"), *arguments]) == 0
    again = json.loads(out.read_text())
    assert again["psnr"] == first["metrics"]["psnr"]["mean"]
    assert again["report"]["images"] == data["images"]
    assert again["report"]["tokenizers"][0]["metrics"] == first["metrics"]
    assert "PSNR, dB" in capsys.readouterr().out


class Page(HTMLParser):
    """Tags of a page, and the texts inside."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in ("meta", "link", "img", "input", "br"):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_the_page_is_whole_and_needs_no_network(report: Path) -> None:
    text = (report / "report.html").read_text(encoding="utf-8")
    assert len(text) < 5_000_000
    page = Page()
    page.feed(text)
    assert page.open == []
    found = {tag for tag, _ in page.tags}
    assert {"header", "main", "nav", "section", "table", "caption", "figure", "figcaption", "svg"} <= found
    pictures = [attributes for tag, attributes in page.tags if tag == "img"]
    assert len(pictures) >= 2 * 3 * 12
    for attributes in pictures:
        assert attributes["alt"]
        assert (attributes["src"] or "").startswith("data:image/webp;base64,")
    for tag, attributes in page.tags:
        if tag == "svg":
            assert attributes.get("aria-label") or attributes.get("aria-hidden")
        for name in ("src", "href"):
            value = attributes.get(name) or ""
            assert not value or value.startswith(("data:", "#")), value
    assert not re.search(r"url\(|@import|https?://(?!www\.w3\.org)", text)
    assert "<b>.png" not in text, "names of files are escaped"
    ids = [attributes["id"] for _, attributes in page.tags if attributes.get("id")]
    assert len(ids) == len(set(ids))
    targets = {(attributes["href"] or "")[1:] for tag, attributes in page.tags if tag == "a"}
    assert targets <= set(ids)


def test_reports_of_two_protocols_do_not_share_a_table(report: Path, place: Path) -> None:
    other = place / "other"
    common = ["--images", str(place / "images"), "--metrics", QUICK]
    arguments = [*common, "--fit", "resize", "--out", str(other)]
    assert main(["eval", str(place / "tok1"), *arguments]) == 0
    first, second = (json.loads((folder / "report.json").read_text()) for folder in (report, other))
    with pytest.raises(ValueError, match=r"reports: expected one protocol .*fit: crop / resize"):
        join_reports([first, second])
    joined = join_reports([first, second], any_protocol=True)
    names = [row["name"] for row in joined["tokenizers"]]
    assert names[0] == "tok0 (default)"
    assert names[-1] == "tok1 (default fit=resize)"
    assert "tok1 (default fit=resize)" in make_page(joined)
    assert "cannot be compared" in make_page(joined)
    assert not joined["pairs"], "their names are others here"
    command = ["eval", "--join", str(report), str(other), "--out", str(place / "joint")]
    assert main(command) == 2
    assert main([*command, "--any-protocol"]) == 0
    assert main([*command, *common]) == 2
    fewer = place / "fewer"
    assert main(["eval", str(place / "tok1"), *common, "--limit", "5", "--out", str(fewer)]) == 0
    third = json.loads((fewer / "report.json").read_text())
    with pytest.raises(ValueError, match="reports: expected the same images"):
        join_reports([first, third])
    mixed = join_reports([first, third], any_protocol=True)
    assert mixed["mixed"]
    last = mixed["tokenizers"][-1]["name"]
    assert last.startswith("tok1 (5 images of ")
    assert mixed["per_image"]["values"][last] == {}, "values of other images have no place beside these"
    assert last in make_page(mixed)


def test_a_hash_that_is_not_of_the_fields_is_refused(report: Path, tmp_path: Path) -> None:
    data = json.loads((report / "report.json").read_text())
    for name, value in (("hash", "0" * 16), ("ssim_range", 2.0)):
        changed = {**data, "protocol": {**data["protocol"], name: value}}
        (tmp_path / "report.json").write_text(json.dumps(changed))
        with pytest.raises(ValueError, match=r"report\.protocol\.hash: expected [0-9a-f]{16}, as its fields give"):
            read_report(tmp_path)


def test_the_table_as_markdown(report: Path) -> None:
    rows = table(json.loads((report / "report.json").read_text()))
    lines = as_markdown(rows).splitlines()
    assert lines[0].startswith("| tokenizer | bits per image | bits, entropy-coded |")
    assert lines[2].startswith("| tok0 | 126.00 |")
    assert len(lines) == 2 + 3 + 7


def test_compare_writes_a_sheet_and_a_verdict(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = place / "sheet.png"
    arguments = ["--images", str(place / "images"), "--metrics", QUICK, "--out", str(out)]
    assert main(["compare", str(place / "tok0"), "jpeg@q60", *arguments]) == 0
    said = capsys.readouterr().out
    assert "PSNR, dB: jpeg q60 is better than tok0 by" in said
    assert "tok0 takes 126 bits per image, jpeg q60" in said
    assert out.read_bytes().startswith(b"\x89PNG")
    assert main(["compare", str(place / "tok0"), str(place / "tok0"), *arguments]) == 2
    assert "different names" in capsys.readouterr().err


def test_progress_is_drawn_on_a_terminal_only(monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    assert progress_line() is None, "stderr of a test is no terminal"
    screen = Terminal()
    monkeypatch.setattr("sys.stderr", screen)
    show = progress_line()
    assert show is not None
    for done in (1, 5, 10):
        show(done, 10)
    drawn = screen.getvalue()
    assert "[###                           ] 1 of 10 images" in drawn
    assert "5 of 10 images, " in drawn
    assert drawn.endswith("s left\033[K\n")


def test_all_metrics_that_can_be_measured(place: Path) -> None:
    out = place / "all.json"
    arguments = ["--images", str(place / "images"), "--limit", "4", "--metrics", "all", "--out", str(out)]
    assert main(["eval", str(place / "tok0"), *arguments]) == 0
    row = json.loads(out.read_text())["report"]["tokenizers"][0]
    assert {*row["metrics"], *row["missing"], "codebook"} >= set(METRICS)
    assert {"psnr", "ssim"} <= set(row["metrics"])


def test_wrong_usage_is_one_sentence(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tok, images = str(place / "tok0"), str(place / "images")
    for arguments, message in (
        ([tok], "images: expected --images FOLDER, got none"),
        ([tok, "--images", images, "--protocol", "mine"], "protocol: expected one of default"),
        ([tok, "--images", images, "--metrics", "beauty"], "metrics: expected one of bits"),
        ([tok, "--images", images, "--metrics", "lpips", "--weights", "vgg16=/no"], "perceptual weights: expected"),
        ([tok, "--images", images, "--weights", "vgg=/no"], "weights: expected NAME=FILE with one of inception"),
        ([tok, "--images", images, "--limit", "0"], "limit: expected a positive number"),
        ([tok, "jpeg@fast", "--images", images], "jpeg@fast: expected jpeg@match"),
        ([tok, "--images", images, "--protocol", "imagenet-val-256"], "expected 32 x 32 pixels, which tok0 takes"),
    ):
        assert main(["eval", *arguments, "--out", str(place / "wrong")]) == 2, arguments
        said = capsys.readouterr().err
        assert message in said
        assert len(said.splitlines()) == 1
