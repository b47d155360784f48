"""Evaluation of images of every shape and kind, of one image and of none, and after an interrupt at every stage."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tokenizers_mm._images import read_size
from tokenizers_mm.cli import main
from tokenizers_mm.eval import run as running
from tokenizers_mm.eval.run import PARTIAL

FAST = "bits,bits_per_pixel,psnr,ssim,ssim_uniform,ms_ssim,codebook"


def noise(height: int, width: int, channels: int = 3) -> np.ndarray:
    rng = np.random.default_rng(height * width + channels)
    return rng.integers(0, 256, (height, width, channels)[: 2 + (channels > 1)], dtype=np.uint8)


def folder_of(place: Path, **images: Image.Image) -> Path:
    place.mkdir()
    for name, image in images.items():
        image.save(place / f"{name}.png")
    return place


@pytest.fixture(scope="module")
def odd(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = folder_of(
        tmp_path_factory.mktemp("odd") / "images",
        pixel=Image.fromarray(noise(1, 1)),
        small=Image.fromarray(noise(3, 5)),
        ten=Image.fromarray(noise(10, 12)),
        row=Image.fromarray(noise(1, 700)),
        column=Image.fromarray(noise(1500, 2)),
        clear=Image.fromarray(noise(17, 64, 4)),
        deep=Image.fromarray(noise(40, 33, 1).astype(np.uint16) * 257),
        grey=Image.fromarray(noise(40, 33, 1)),
        grey_clear=Image.fromarray(noise(40, 33, 2)),
        bits=Image.fromarray(noise(40, 33, 1)).convert("1"),
        palette=Image.fromarray(noise(40, 33)).convert("P"),
        wide=Image.fromarray(noise(180, 190)),
        flat=Image.new("RGB", (64, 48), (200, 200, 200)),
    )
    (folder / "cut.png").write_bytes((folder / "wide.png").read_bytes()[:900])
    (folder / "empty.png").write_bytes(b"")
    return folder


def evaluated(out: Path, images: Path, *more: str, names: tuple[str, ...] = ("jpeg@q75",)) -> dict[str, Any]:
    assert main(["eval", *names, "--images", str(images), "--out", str(out), *more]) == 0
    assert "Reconstructions" in (out / "report.html").read_text()

    def refuse(constant: str) -> float:
        raise AssertionError(constant)

    return json.loads((out / "report.json").read_text(), parse_constant=refuse)


def test_every_shape_and_kind(odd: Path, tmp_path: Path) -> None:
    report = evaluated(tmp_path / "out", odd, "--protocol", "native", "--metrics", FAST, names=("jpeg@q75", "webp@q75"))
    assert report["images"]["count"] == 13
    assert [Path(reason.split(": ")[0]).name for reason in report["images"]["skipped"]] == ["cut.png", "empty.png"]
    metrics, values = report["tokenizers"][0]["metrics"], report["per_image"]["values"]["jpeg q75"]
    names = report["per_image"]["names"]
    for metric, least in (("psnr", 1), ("ssim_uniform", 7), ("ssim", 11), ("ms_ssim", 176)):
        sides = [min(read_size(odd / name)) for name in names]
        known = [side >= least for side in sides]
        infinite = metrics[metric]["infinite"]
        assert metrics[metric]["images"] + infinite == sum(known)
        assert metrics[metric]["left_out"] == 13 - sum(known)
        assert sum(value is not None for value in values[metric]) == sum(known) - infinite
    assert main(["compare", "jpeg@q75", "webp@q75", "--images", str(odd), "--protocol", "native", "--metrics", "psnr",
                 "--out", str(tmp_path / "sheet.png")]) == 0  # fmt: skip


@pytest.mark.parametrize("metrics", ["psnr", "ssim", "bits", "codebook", "psnr, ssim"])
def test_one_pixel_and_one_metric(metrics: str, tmp_path: Path) -> None:
    images = folder_of(tmp_path / "images", pixel=Image.fromarray(noise(1, 1)))
    evaluated(tmp_path / "out", images, "--metrics", metrics)
    single = tmp_path / "one.json"
    assert main(["eval", "jpeg@q75", "--images", str(images), "--metrics", metrics, "--out", str(single)]) == 0
    assert json.loads(single.read_text())["images"] == 1


def test_the_page_says_what_orders_its_images(odd: Path, tmp_path: Path) -> None:
    for metrics, said in (("psnr,ssim", "by PSNR"), ("ssim", "by SSIM"), ("bits", "The first images, shown")):
        evaluated(tmp_path / "out", odd, "--metrics", metrics)
        assert said in (tmp_path / "out" / "report.html").read_text()


def test_images_without_loss(tmp_path: Path) -> None:
    images = folder_of(tmp_path / "images", **{f"grey{v}": Image.new("RGB", (64, 64), (v, v, v)) for v in (0, 128)})
    report = evaluated(tmp_path / "out", images, "--metrics", FAST)
    metrics = report["tokenizers"][0]["metrics"]
    assert (metrics["psnr"]["mean"], metrics["psnr"]["infinite"]) == (None, 2)
    assert metrics["ssim"]["mean"] == metrics["ssim_uniform"]["mean"] == 1.0
    assert "PSNR infinite, SSIM 1.00" in (tmp_path / "out" / "report.html").read_text()


def test_nothing_to_evaluate_is_one_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    nothing = folder_of(tmp_path / "nothing")
    broken = folder_of(tmp_path / "broken")
    (broken / "x.png").write_bytes(b"junk")
    for images, more, message in (
        (nothing, (), "images: expected image files"),
        (broken, (), "images: expected at least one that can be used, got none"),
        (tmp_path / "no", (), "images: expected a folder"),
        (broken, ("--protocol", "native", "--fit", "adm"), "expected a size for the crop of ADM"),
    ):
        assert (
            main(
                [
                    "eval",
                    "jpeg@q75",
                    "--images",
                    str(images),
                    "--metrics",
                    "psnr",
                    "--out",
                    str(tmp_path / "out"),
                    *more,
                ]
            )
            == 2
        )
        said = capsys.readouterr().err
        assert message in said
        assert len(said.splitlines()) == 1


STAGES = {
    "after the images": "tokenizers_mm.eval.report.make_report",
    "before the page": "tokenizers_mm.eval.page.make_page",
    "before the report is written": "tokenizers_mm.cli.eval.write_json",
    "before the page is written": "tokenizers_mm.cli.eval.write_text",
    "before the table": "tokenizers_mm.cli.eval.print_table",
    "while the state is saved": "tokenizers_mm.eval.run.save_file",
}


@pytest.mark.parametrize("stage", STAGES)
def test_an_interrupt_at_any_stage_costs_nothing(
    stage: str, odd: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    command = ["eval", "jpeg@q75", "--images", str(odd), "--metrics", "bits,psnr,ssim", "--out"]
    assert main([*command, str(tmp_path / "whole")]) == 0
    monkeypatch.setattr(running.carry_out, "__defaults__", (None, None, 0.0))  # saved after every batch
    calls, save = {"stop": 0, "save": 0}, running.save_file

    def stop(*_: Any, **__: Any) -> None:
        calls["stop"] += 1
        raise KeyboardInterrupt

    def stop_late(*given: Any, **more: Any) -> None:
        calls["save"] += 1
        stop() if calls["save"] > 4 else save(*given, **more)

    with monkeypatch.context() as patch:
        patch.setattr(STAGES[stage], stop_late if STAGES[stage].endswith("save_file") else stop)
        assert main([*command, str(tmp_path / "out")]) == 130
    assert calls["stop"] == 1
    if stage != "before the table":
        assert (tmp_path / "out" / PARTIAL).is_file()
    seen: list[int] = []
    prepare = running.Run.prepare

    def counted(self: running.Run, image: Image.Image, name: str) -> Image.Image:
        seen.append(1)
        return prepare(self, image, name)

    monkeypatch.setattr(running.Run, "prepare", counted)
    assert main([*command, str(tmp_path / "out")]) == 0
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["report.html", "report.json"]
    first, again = (json.loads((tmp_path / name / "report.json").read_text()) for name in ("whole", "out"))
    for report in (first, again):
        del report["command"], report["seconds"], report["tokenizers"][0]["speed"]
    assert again == first
    shown = 12
    assert len(seen) <= shown + (13 if stage == "before the table" else 9)


def test_images_that_changed_since_an_interrupt_are_measured_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    images = folder_of(tmp_path / "images", **{f"grey{v}": Image.fromarray(noise(16, 16 + v)) for v in range(4)})
    command = ["eval", "jpeg@q75", "--images", str(images), "--metrics", "psnr", "--out"]
    monkeypatch.setattr(running.carry_out, "__defaults__", (None, None, 0.0))
    with monkeypatch.context() as patch:
        patch.setattr(STAGES["after the images"], lambda *_: (_ for _ in ()).throw(KeyboardInterrupt()))
        assert main([*command, str(tmp_path / "out")]) == 130
    Image.fromarray(noise(16, 16)[::-1].copy()).save(images / "grey0.png")
    for name in ("out", "whole"):
        assert main([*command, str(tmp_path / name)]) == 0
    first, again = (json.loads((tmp_path / name / "report.json").read_text()) for name in ("whole", "out"))
    assert again["images"] == first["images"]
    assert again["per_image"] == first["per_image"]
