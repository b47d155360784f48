"""The command line: what each verb leaves, and one sentence with exit code 2 for bad input."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

from tests.mar_cases import tiny_config as tiny_mar_config
from tests.models.test_tokenflow import tiny_config
from tokenizers_mm.cli import main
from tokenizers_mm.models import MAR, TokenFlow


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("cli")
    torch.manual_seed(0)
    TokenFlow.from_config(tiny_config()).save(folder / "tok")
    (folder / "images").mkdir()
    for index, colour in enumerate(("red", "green", "blue")):
        Image.new("RGB", (32, 32), colour).save(folder / "images" / f"{index}.png")
    return folder


def test_info_encode_decode_eval(saved: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tok, images = str(saved / "tok"), sorted(str(p) for p in (saved / "images").iterdir())
    assert main(["info", tok]) == 0
    assert "shared: 21 ids, 64 codes, grids 1x1 2x2 4x4" in capsys.readouterr().out
    ids = str(tmp_path / "ids.safetensors")
    assert main(["encode", *images, "--tokenizer", tok, "--out", ids]) == 0
    assert main(["decode", ids, "--tokenizer", tok, "--out-dir", str(tmp_path / "out")]) == 0
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["00000.png", "00001.png", "00002.png"]
    (saved / "images" / "bad.png").write_bytes(b"junk")
    report = str(tmp_path / "report.json")
    assert main(["eval", "--tokenizer", tok, "--images", str(saved / "images"), "--out", report]) == 0
    (saved / "images" / "bad.png").unlink()
    data = json.loads(Path(report).read_text())
    assert data["images"] == 3
    assert "bad.png" in data["skipped"][0]
    assert data["protocol"]["ssim"].startswith("Gaussian window, sigma 1.5")
    assert data["rfid"] is None
    assert "weights" in data["rfid_missing"]
    assert main(["doctor"]) == 0
    assert "kernels        native" in capsys.readouterr().out


def test_latents_go_the_same_way(tmp_path: Path) -> None:
    torch.manual_seed(0)
    tokenizer = MAR.from_config(tiny_mar_config()).eval()
    tokenizer.save(tmp_path / "mar")
    Image.new("RGB", (64, 32), "red").save(tmp_path / "a.png")
    out = str(tmp_path / "z.safetensors")
    assert main(["encode", str(tmp_path / "a.png"), "--tokenizer", str(tmp_path / "mar"), "--out", out]) == 0
    assert main(["decode", out, "--tokenizer", str(tmp_path / "mar"), "--out-dir", str(tmp_path / "o")]) == 0
    again = Image.open(tmp_path / "o" / "00000.png")
    expected = tokenizer.to_pil(tokenizer.decode(tokenizer.encode(tmp_path / "a.png")))[0]
    assert again.tobytes() == expected.tobytes()


def test_bad_input_is_one_sentence_and_code_2(saved: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tok = str(saved / "tok")
    Image.new("RGB", (20, 32)).save(tmp_path / "small.png")
    (tmp_path / "text.png").write_text("hello")
    (tmp_path / "empty").mkdir()
    out = ["--tokenizer", tok, "--out", str(tmp_path / "x")]
    config = str(Path(__file__).parents[1] / "configs" / "debug.yaml")
    for arguments, message in [
        (["encode", str(tmp_path / "small.png"), *out], "images: expected 32 x 32 pixels, got 32 x 20"),
        (["encode", str(tmp_path / "text.png"), *out], "expected a readable image"),
        (["encode", str(tmp_path / "no.png"), *out], "expected an image file, got no such file"),
        (["eval", "--images", str(tmp_path / "empty"), *out], "images: expected image files"),
        (["info", str(tmp_path / "empty")], "config.json: expected a config.json"),
        (
            ["decode", str(tmp_path / "text.png"), "--tokenizer", tok, "--out-dir", str(tmp_path / "o")],
            "ids: expected a whole file",
        ),
        (["train", config, "optimiser.lr=1"], "config.optimiser: unknown key; did you mean 'optimizer'"),
        (["train", str(tmp_path / "no.yaml")], "config: expected the path of a YAML file"),
    ]:
        assert main(arguments) == 2, arguments
        captured = capsys.readouterr().err
        assert message in captured, (arguments, captured)
        assert "Traceback" not in captured
        assert len(captured.strip().splitlines()) == 1
    assert not (tmp_path / "x").exists()


def test_usage_errors_and_the_process_itself(saved: Path) -> None:
    run = [sys.executable, "-m", "tokenizers_mm.cli"]
    for arguments, code in [
        ([], 2),
        (["nonsense"], 2),
        (["--help"], 0),
        (["info", str(saved / "tok")], 0),
        (["train"], 2),
    ]:
        result = subprocess.run([*run, *arguments], capture_output=True, text=True)
        assert result.returncode == code, result.stderr
        assert "Traceback" not in result.stderr
