"""The command line: what each verb leaves, and one sentence with exit code 2 for bad input."""

import errno
import json
import os
import signal
import subprocess
import sys
import time
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

import pytest
import torch
from PIL import Image

from benchmarks.tiny import dualvitok_config as tiny_dualvitok_config
from benchmarks.tiny import tokenflow_config as tiny_config
from tests.cases import ROOT
from tests.mar_cases import tiny_config as tiny_mar_config
from tokenizers_mm.cli import TRACEBACK, guarded, main
from tokenizers_mm.data.codes import read_codes
from tokenizers_mm.eval.candidates import Encoded, Ours
from tokenizers_mm.models import MAR, DualViTok, TokenFlow


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
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["0.png", "1.png", "2.png"]
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
    again = Image.open(tmp_path / "o" / "a.png")
    expected = tokenizer.to_pil(tokenizer.decode(tokenizer.encode(tmp_path / "a.png")))[0]
    assert again.tobytes() == expected.tobytes()


def test_bad_input_is_one_sentence_and_code_2(saved: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tok = str(saved / "tok")
    Image.new("RGB", (20, 32)).save(tmp_path / "small.png")
    (tmp_path / "text.png").write_text("hello")
    (tmp_path / "empty").mkdir()
    out = ["--tokenizer", tok, "--out", str(tmp_path / "x.npz")]
    config = str(Path(__file__).parents[1] / "configs" / "debug.yaml")
    for arguments, message in [
        (["encode", str(tmp_path / "small.png"), *out], "small.png: expected 32 x 32 pixels, got 32 x 20"),
        (["encode", str(tmp_path / "text.png"), *out], "expected a readable image"),
        (["encode", str(tmp_path / "no.png"), *out], "expected an image file, got no such file"),
        (["eval", "--images", str(tmp_path / "empty"), *out], "images: expected image files"),
        (["info", str(tmp_path / "empty")], "config.json: expected a config.json"),
        (
            ["decode", str(tmp_path / "text.png"), "--tokenizer", tok, "--out-dir", str(tmp_path / "o")],
            "ids: expected a whole file",
        ),
        (["train", config, "objective.optimiser.lr=1"], "optimiser: unknown key; did you mean 'optimizer'"),
        (["train", str(tmp_path / "no.yaml")], "config: expected the path of a YAML file"),
    ]:
        assert main(arguments) == 2, arguments
        captured = capsys.readouterr().err
        assert message in captured, (arguments, captured)
        assert "Traceback" not in captured
        assert len(captured.strip().splitlines()) == 1
    assert not (tmp_path / "x.npz").exists()


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


MIXED = ((32, 32), (64, 32), (32, 32), (32, 96), (64, 32))
"""Sizes (height, width) of images that a tokenizer of any size takes."""


@pytest.fixture(scope="module")
def any_size(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two tokenizers that take any size, and images of several sizes in a folder."""
    folder = tmp_path_factory.mktemp("any")
    torch.manual_seed(0)
    DualViTok.from_config(tiny_dualvitok_config()).save(folder / "dualvitok")
    MAR.from_config(tiny_mar_config()).save(folder / "mar")
    (folder / "images").mkdir()
    for index, (height, width) in enumerate(MIXED):
        noise = torch.randint(
            256, (height, width, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(index)
        )
        Image.fromarray(noise.numpy()).save(folder / "images" / f"{index}.png")
    return folder


@pytest.mark.parametrize("family", ["dualvitok", "mar"])
@pytest.mark.parametrize("ending", [".safetensors", ".npz"])
def test_any_size_goes_out_and_comes_back(any_size: Path, tmp_path: Path, family: str, ending: str) -> None:
    from tokenizers_mm import load

    out = tmp_path / f"codes{ending}"
    first = str(any_size / "images" / "3.png")
    files = [first, str(any_size / "images")]
    assert main(["encode", *files, "--tokenizer", str(any_size / family), "--out", str(out)]) == 0
    items = list(read_codes(out))
    assert [(item.height, item.width) for item in items] == [MIXED[3], *MIXED]
    tokenizer = load(any_size / family)
    decode = ["decode", str(out), "--tokenizer", str(any_size / family), "--out-dir", str(tmp_path / "out")]
    assert main(decode) == 0
    paths = [Path(first), *sorted((any_size / "images").iterdir())]
    for index, path in enumerate(paths):
        expected = tokenizer.to_pil(tokenizer.decode(tokenizer.encode(path)))[0]
        written = Image.open(tmp_path / "out" / (path.name if index == 0 else f"images/{path.name}"))
        assert written.size == expected.size
        difference = torch.tensor(list(written.tobytes())) - torch.tensor(list(expected.tobytes()))
        assert int(difference.abs().max()) <= 1, "batches of another size may round otherwise"


def test_eval_honours_fit_for_any_size(any_size: Path, tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    Image.new("RGB", (50, 40), "red").save(tmp_path / "images" / "odd.png")
    evaluate = ["eval", "--tokenizer", str(any_size / "dualvitok"), "--images", str(tmp_path / "images"), "--out"]
    for fit, code in (("crop", 0), ("pad", 0), ("resize", 0), ("refuse", 2)):
        assert main([*evaluate, str(tmp_path / f"{fit}.json"), "--fit", fit]) == code
    assert sorted(path.name for path in tmp_path.iterdir()) == ["crop.json", "images", "pad.json", "resize.json"]


def test_a_broken_image_is_reported_and_counted(
    saved: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("a.png", "c.png"):
        Image.new("RGB", (32, 32), "red").save(tmp_path / name)
    (tmp_path / "b.png").write_bytes(b"junk")
    command = ["encode", str(tmp_path), "--tokenizer", str(saved / "tok"), "--out", str(tmp_path / "x.npz")]
    assert main(command) == 0
    said = capsys.readouterr()
    assert "b.png: expected a readable image" in said.err
    assert "2 images, 1 skipped" in said.out
    (tmp_path / "x.npz").unlink()
    assert main([*command, "--strict"]) == 2
    for name in ("a.png", "c.png"):
        (tmp_path / name).unlink()
    assert main(command) == 2
    said = capsys.readouterr().err.strip().splitlines()
    assert len(said) == 2
    assert all("b.png: expected a readable image" in line for line in said)
    assert not (tmp_path / "x.npz").exists()


def test_names_that_are_no_utf_8(saved: Path, tmp_path: Path) -> None:
    """eval, encode and decode end with their files, in a process whose streams are UTF-8."""
    folder = tmp_path / "images"
    folder.mkdir()
    for name, data in ((b"good\xe9.png", None), (b"bad\xff.png", b"junk")):
        place = os.fsencode(folder) + b"/" + name
        if data is None:
            Image.new("RGB", (32, 32), "red").save(tmp_path / "plain.png")
            Path(os.fsdecode(place)).write_bytes((tmp_path / "plain.png").read_bytes())
        else:
            Path(os.fsdecode(place)).write_bytes(data)
    tok, report, ids = str(saved / "tok"), str(tmp_path / "report.json"), str(tmp_path / "ids.safetensors")
    run = [sys.executable, "-m", "tokenizers_mm.cli"]
    odd_out = os.fsencode(tmp_path) + b"/\xe9.npz"
    for arguments in (
        ["eval", "--tokenizer", tok, "--images", str(folder), "--out", report],
        ["encode", str(folder), "--tokenizer", tok, "--out", ids],
        ["encode", str(folder), "--tokenizer", tok, "--out", odd_out],
    ):
        result = subprocess.run([*run, *arguments], capture_output=True, cwd=ROOT)
        assert result.returncode == 0, result.stderr
        assert b"Traceback" not in result.stderr
    data = json.loads(Path(report).read_text(encoding="utf-8"))
    assert data["images"] == 1
    assert "bad\\xff" in data["skipped"][0] or "bad\\udcff" in data["skipped"][0]


def test_a_lossless_report_is_json(saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def strict(text: str) -> None:
        raise ValueError(text)

    monkeypatch.setattr(Ours, "encode", lambda _, x, target=None: Encoded(x, [1.0] * len(x)))
    monkeypatch.setattr(Ours, "decode", lambda _, encoded: encoded.value)
    out = tmp_path / "report.json"
    command = ["eval", "--tokenizer", str(saved / "tok"), "--images", str(saved / "images"), "--out", str(out)]
    assert main(command) == 0
    data = json.loads(out.read_text(), parse_constant=strict)
    assert (data["psnr"], data["lossless"], data["ssim"]) == (None, 3, pytest.approx(1.0))


def test_outputs_are_judged_before_the_work(saved: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("fifo.npz", "a.json"):
        os.mkfifo(tmp_path / name)
    image, tok = str(saved / "images" / "0.png"), str(saved / "tok")
    evaluate = ["eval", "--images", str(saved / "images"), "--tokenizer", tok, "--out"]
    for arguments, message in [
        (["encode", image, "--tokenizer", tok, "--out", str(tmp_path / "x.jpg")], "or .npz or .parquet, got"),
        (["encode", image, "--tokenizer", tok, "--out", str(tmp_path / "fifo.npz")], "got a FIFO"),
        ([*evaluate, "/dev/null"], "got a device"),
        ([*evaluate, image], "expected a folder, a new name or a .json file, got a file"),
        ([*evaluate, str(tmp_path / "a.json")], "got a FIFO"),
    ]:
        assert main(arguments) == 2, arguments
        said = capsys.readouterr().err
        assert message in said
        assert len(said.splitlines()) == 1


@pytest.mark.skipif(torch.cuda.is_available(), reason="a machine with a GPU has the device")
def test_a_missing_device_is_one_sentence(saved: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tok, image = str(saved / "tok"), str(saved / "images" / "0.png")
    for device in ("cuda", "cuda:3", "tpu?", "meta"):
        command = ["encode", image, "--tokenizer", tok, "--device", device, "--out", str(tmp_path / "x.npz")]
        assert main(command) == 2
        said = capsys.readouterr().err
        assert said.startswith("tokenizers-mm encode: device: expected cpu")
        assert len(said.splitlines()) == 1


@pytest.mark.filterwarnings("ignore:.*does not say which")
def test_files_of_codes_that_are_wrong_are_one_sentence(
    saved: Path, any_size: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from safetensors.torch import save_file

    place = {"height": "32", "width": "32"}
    ids = torch.randint(64, (2, 21))
    cases: list[tuple[dict[str, torch.Tensor], dict[str, str], str]] = [
        ({"ids": ids.float()}, place, "expected integers, got float32"),
        ({"ids": ids - 100}, place, "expected values from 0 to 63"),
        ({"ids": ids[0]}, place, "expected 2 axes"),
        ({"ids": ids}, {"height": "x", "width": "32"}, "expected numbers"),
        ({"ids": ids}, {"height": "32"}, "a file that `encode` wrote"),
        ({"ids": ids}, {"height": "99999999", "width": "99999999"}, "expected sizes of images"),
        ({"latents": ids.float()[..., None]}, place | {"rows": "3", "columns": "7"}, "the other kind"),
        ({"ids": ids[0], "offsets": torch.tensor([0, 30, 21]), "sizes": torch.full((2, 2), 32)}, {}, "that fit"),
        ({"ids": ids[0], "offsets": torch.tensor([[0]]), "sizes": torch.full((2, 2), 32)}, {}, "that fit"),
        ({"x": ids}, place, "a file that `encode` wrote"),
    ]
    out = ["--out-dir", str(tmp_path / "out")]
    for tensors, facts, message in cases:
        save_file(tensors, tmp_path / "x.safetensors", metadata=facts)
        assert main(["decode", str(tmp_path / "x.safetensors"), "--tokenizer", str(saved / "tok"), *out]) == 2
        said = capsys.readouterr().err
        assert message in said
        assert len(said.splitlines()) == 1
        assert len(said) < 600
    for junk in (b"", b"PK\x03\x04junk"):
        (tmp_path / "x.npz").write_bytes(junk)
        assert main(["decode", str(tmp_path / "x.npz"), "--tokenizer", str(saved / "tok"), *out]) == 2
    for kind in (torch.int32, torch.uint16, torch.uint8, torch.int16):
        save_file({"ids": ids.to(kind)}, tmp_path / "x.safetensors", metadata=place)
        assert main(["decode", str(tmp_path / "x.safetensors"), "--tokenizer", str(saved / "tok"), *out]) == 0


class OutOfMemoryError(RuntimeError):
    """As torch names its own."""


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (ValueError("x: expected a, got b"), 2, "x: expected a, got b"),
        (ValueError("ids " * 20_000), 2, "(79999 characters)"),
        (FileNotFoundError(errno.ENOENT, "No such file or directory", "a.txt"), 2, "a.txt: No such file or directory"),
        (OSError(errno.ENOSPC, "No space left on device", b"\xff.png"), 2, "\\udcff.png: No space left on device"),
        (OSError("broken"), 2, "file: expected one that can be read and written, got broken"),
        (UnicodeDecodeError("utf-8", b"ab\xe9", 2, 3, "bad"), 2, "expected utf-8, got byte 0xe9 at 2"),
        (ImportError("No module named 'lpips'"), 2, "expected an optional package to be installed"),
        (MemoryError(), 2, "memory: expected enough for this input, got MemoryError"),
        (OutOfMemoryError("CUDA out of memory."), 2, "memory: expected enough"),
        (
            RuntimeError("[enforce fail] DefaultCPUAllocator: not enough memory: you tried"),
            2,
            "memory: expected enough",
        ),
        (
            RuntimeError("[enforce fail] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to allocate"),
            2,
            "memory: expected enough",
        ),
        (RuntimeError("No CUDA GPUs are available"), 2, "device: expected one that torch can use here"),
        (AssertionError("Torch not compiled with CUDA enabled"), 2, "device: expected one that torch can use here"),
        (RuntimeError("DataLoader worker (pid(s) 7) exited unexpectedly"), 2, "workers: expected processes that live"),
        (BrokenProcessPool("A process in the process pool was ended"), 2, "workers: expected processes that live"),
        (
            ValueError("Caught ValueError in DataLoader worker process 0.\nOriginal Traceback:\n  x\nValueError: a: b"),
            2,
            "program: a: b",
        ),
        (KeyboardInterrupt(), 130, "program: interrupted"),
        (TypeError("ours"), 1, "a failure of tokenizers_mm: TypeError: ours (at test_cli.py:"),
        (KeyError("ours"), 1, "a failure of tokenizers_mm: KeyError"),
    ],
)
def test_every_error_is_one_sentence(
    error: BaseException, code: int, message: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def run() -> int:
        raise error

    assert guarded("program", run) == code
    said = capsys.readouterr().err
    assert message in said
    assert said.startswith("program: ")
    assert len(said.splitlines()) == 1
    assert len(said) < 1200
    monkeypatch.setenv(TRACEBACK, "1")
    assert guarded("program", run) == code
    assert ("Traceback" in capsys.readouterr().err) == (code < 100)


def test_memory_that_is_not_there_is_one_sentence(capsys: pytest.CaptureFixture[str]) -> None:
    """In torch's own words on this system."""
    assert guarded("program", lambda: int(torch.empty(1 << 60, dtype=torch.uint8)[0])) == 2
    assert capsys.readouterr().err.startswith("program: memory: expected enough for this input, got ")


def test_safetensors_errors_and_full_stdout() -> None:
    code = "from tokenizers_mm.cli import guarded\nfrom safetensors import SafetensorError\nimport sys\n"
    raising = code + "def run(): raise SafetensorError('header too large')\nsys.exit(guarded('p', run))"
    result = subprocess.run([sys.executable, "-c", raising], capture_output=True, text=True, cwd=ROOT)
    assert (result.returncode, result.stderr.splitlines()[0].split(", got ")[1]) == (2, "header too large")
    if Path("/dev/full").exists():
        printing = code + "sys.exit(guarded('p', lambda: print('x')))"
        with open("/dev/full", "w") as full:
            result = subprocess.run([sys.executable, "-c", printing], stdout=full, stderr=subprocess.PIPE, cwd=ROOT)
        assert b"No space left" in result.stderr
        assert result.stderr.count(b"\n") == 1
        assert result.returncode == 2


@pytest.mark.parametrize("closed", [">&-", "2>&-", ">&- 2>&-", "<&- >&- 2>&-"])
def test_closed_streams_change_nothing(closed: str) -> None:
    code = "from tokenizers_mm.cli import guarded\nfrom tokenizers_mm.cli.progress import Progress\nimport sys\n"
    code += "def run():\n with Progress(3, every=0.0) as progress: progress(1); print('done')\n return 7\n"
    command = ["sh", "-c", f'exec "$0" -c "$1" {closed}', sys.executable, code + "sys.exit(guarded('p', run))"]
    result = subprocess.run(command, capture_output=True, cwd=ROOT)
    assert result.returncode == 7
    assert result.stdout == (b"" if ">&-" in closed.replace("2>&-", "") else b"done\n")


def test_an_interrupt_is_one_line_and_code_130(saved: Path) -> None:
    code = (
        "import sys, time; from tokenizers_mm.cli import guarded\n"
        "def run(): print('running', flush=True); time.sleep(60)\n"
        "sys.exit(guarded('p', run))"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT
    )
    assert process.stdout is not None
    process.stdout.readline()
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=30)
    assert (process.returncode, said) == (130, "p: interrupted\n")


def test_help_version_usage_and_info_need_no_torch(saved: Path) -> None:
    """And so they take a small part of the time of `import torch` (best of three)."""
    code = "import sys; from tokenizers_mm.cli import main\ntry: main(sys.argv[1:])\nexcept SystemExit: pass\n"
    code += "assert not {'torch', 'PIL', 'timm'} & set(sys.modules)"

    def seconds(*command: str) -> float:
        times = []
        for _ in range(3):
            start = time.perf_counter()
            subprocess.run([sys.executable, "-c", *command], check=True, cwd=ROOT, capture_output=True)
            times.append(time.perf_counter() - start)
        return min(times)

    whole = seconds("import torch")
    for arguments in (["--help"], ["--version"], ["nonsense"], ["info", str(saved / "tok")]):
        assert seconds(code, *arguments) < 0.5 * whole
