"""`tokenizers-mm train` as people use it: presets, help, runs that exist, what it says at the end, its checkpoints."""

import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from accelerate.state import AcceleratorState
from PIL import Image

import tokenizers_mm as tmm
from tests.cases import ROOT
from tests.tables import kept_tables
from tokenizers_mm.config_reference import keys_of, meanings_of
from tokenizers_mm.data.photographs import fixed_crops
from tokenizers_mm.losses import LOSSES
from train.__main__ import main
from train.checkpoint import list_checkpoints, read_checkpoint
from train.config import read_config
from train.export import export_checkpoint
from train.export import main as export_main
from train.log import Pace, read_log
from train.presets import PRESETS, make_preset, scales
from train.reference import markdown, sections
from train.summary import curves_of, last_lines

pytestmark = pytest.mark.usefixtures("one_thread")

QUICK = ["batch_size=2", "accumulate=1", "objective.data.workers=0", "log_every=1", "sample_every=0", "precision=fp32"]


@pytest.fixture(autouse=True)
def fresh_accelerator() -> Iterator[None]:
    yield
    AcceleratorState._reset_state(True)


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of four photographs of several sizes, one of them in a folder inside, and a file that is none."""
    folder = tmp_path_factory.mktemp("photos")
    (folder / "more").mkdir()
    for index, crop in enumerate(fixed_crops("heldout", 4, 90)):
        crop.resize((90 + 10 * index, 80)).save(folder / ("more" if index == 3 else ".") / f"{index}.png")
    (folder / "broken.png").write_bytes(b"junk")
    return folder


def test_scales_end_with_the_grid() -> None:
    for cells in range(1, 65):
        found = scales(cells)
        sides = [rows for rows, _ in found]
        assert sides[0] == 1
        assert sides[-1] == cells
        assert sides == sorted(set(sides))
        assert len(sides) <= 9
    for name, cells in (("tokenflow_clipb_224", 14), ("tokenflow_vitamin_256", 16), ("demo", 8)):
        data = yaml.safe_load((ROOT / "configs" / f"{name}.yaml").read_text())
        assert data["objective"]["model"]["config"]["scales"] == scales(cells)


@pytest.mark.parametrize("name", sorted(PRESETS))
def test_a_preset_fits_every_size(name: str, images: Path) -> None:
    """At its own size it is the shipped configuration but for the data; others have the grids that follow."""
    preset = PRESETS[name]
    for size in (preset.size, 2 * preset.factor, 5 * preset.factor):
        data = yaml.safe_load(make_preset(name, [], "", str(images), size))
        assert data["out"] == f"runs/{name}_{size}"
        assert data["objective"]["data"]["sources"][0]["path"] == str(images)
        model = data["objective"]["model"]
        if name == "tokenflow":
            assert model["config"]["image_size"] == [size, size]
            assert model["config"]["scales"][-1] == [size // 16] * 2
        else:
            assert data["objective"]["data"]["image_size"] == [size, size]
    codebook = [] if name == "mar" else [1 << 10]
    for count in codebook:
        made = make_preset(name, [], "", str(images), codebook=count)
        assert f"codebook_size: {count}" in made
    for size in (0, preset.factor + 1):
        with pytest.raises(ValueError, match=f"--size: expected a multiple of {preset.factor} pixels"):
            make_preset(name, [], "", None, size)


def test_one_command_trains_on_a_folder(images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "run"
    command = ["--preset", "small", "--images", str(images), "--size", "64", "--codebook", "128", f"out={out}"]
    command += ["steps=3", "save_every=2", *QUICK]
    assert main(command) == 0
    said = capsys.readouterr()
    assert said.out.splitlines()[0].startswith("step 3: pixel")
    assert said.out.splitlines()[-2:] == [f"curves: {out / 'curves.png'}", f"the tokenizer is in {out / 'tokenizer'}"]
    with Image.open(out / "curves.png") as image:
        assert image.width > 300
    tok = tmm.load(out / "tokenizer")
    assert tok.codebook_size == 128
    assert tok.encode(images / "0.png", fit="crop").ids.shape[0] == 1
    assert (out / "config.yaml").read_text().count("# Made by: tokenizers-mm train --preset small --images") == 1
    written = read_config(str(out / "config.yaml"), [])
    assert (written.steps, written.batch_size, written.out) == (3, 2, str(out))
    AcceleratorState._reset_state(True)
    assert main([*command[:-7], "steps=4", "save_every=2", *QUICK]) == 2, "another configuration in the same folder"
    assert "got" in capsys.readouterr().err
    assert main([str(out / "config.yaml"), "steps=4"]) == 0
    assert "resumed from step 3" in capsys.readouterr().err
    AcceleratorState._reset_state(True)
    assert main([*command, "--overwrite"]) == 0
    assert [line["step"] for line in read_log(out / "log.jsonl")] == [1, 2, 3]


def test_a_preset_of_odd_names_and_in_a_damaged_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    odd = tmp_path / "new\nline: [ '\u00e9"
    odd.mkdir()
    command = ["--preset", "small", "--images", str(odd), "--size", "64"]
    assert main([*command, "--check"]) == 0
    assert yaml.safe_load(capsys.readouterr().out)["objective"]["data"]["sources"][0]["path"] == str(odd)
    (tmp_path / "run").mkdir()
    for damage in (b"[", b"\xff\xfe", b"- a", b"a: ${b}"):
        (tmp_path / "run" / "config.yaml").write_bytes(damage)
        assert main([*command, "--out", str(tmp_path / "run")]) == 2
        said = capsys.readouterr().err
        assert f"config {tmp_path / 'run' / 'config.yaml'}" in said
        assert said.count("\n") == 1


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("objective.kind=[1]", "config.objective.kind: expected one of"),
        ("objective.kind={a: 1}", "config.objective.kind: expected one of"),
        ("objective.language_model.config.hidden_size=x", "config.objective.language_model: expected a causal"),
        ("objective.language_model.config.num_attention_heads=3", "config.objective.language_model: expected a causal"),
    ],
)
def test_values_of_other_types_are_one_sentence(
    override: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["language_debug", override, "--check"]) == 2
    said = capsys.readouterr().err
    assert message in said
    assert said.count("\n") == 1


def test_a_run_is_not_overwritten_unasked(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "run"
    command = ["debug", f"out={out}", "steps=2", "save_every=1", *QUICK, "objective.revival.every=0"]
    assert main([*command, "resume=never"]) == 0
    AcceleratorState._reset_state(True)
    before = {
        path: path.read_bytes() for path in sorted(out.rglob("*")) if path.is_file() and "curves" not in path.name
    }
    assert main([*command, "resume=never"]) == 2
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert "config.out: expected a folder without a run" in said
    assert "a run up to step 2" in said
    assert all(path.read_bytes() == data for path, data in before.items())
    assert main([*command, "resume=never", "--overwrite", "steps=1"]) == 0
    assert [step for step, _ in list_checkpoints(out)] == [1]


def test_checkpoints_are_exported(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "run"
    assert main(["debug", f"out={out}", "steps=3", "save_every=1", "keep=3", *QUICK]) == 0
    AcceleratorState._reset_state(True)
    assert export_checkpoint(str(out), str(tmp_path / "newest")) == 3
    final = tmm.load(out / "tokenizer").state_dict()
    newest = tmm.load(tmp_path / "newest" / "tokenizer").state_dict()
    assert all(bool((newest[name] == tensor).all()) for name, tensor in final.items())
    AcceleratorState._reset_state(True)
    assert export_main([str(out), "--step", "1", "--out", str(tmp_path / "first")]) == 0
    assert "the networks of step 1" in capsys.readouterr().out
    first = tmm.load(tmp_path / "first" / "tokenizer").state_dict()
    average = read_checkpoint(dict(list_checkpoints(out))[1])["average"]
    assert all(bool((first[name] == average[f"module.{name}"]).all()) for name in first)
    assert any(bool((first[name] != final[name]).any()) for name in final)
    assert export_main([str(out), "--step", "9", "--out", str(tmp_path / "none")]) == 2
    assert "step: expected one of [1, 2, 3], got 9" in capsys.readouterr().err
    assert export_main([str(tmp_path), "--out", str(tmp_path / "none")]) == 2
    assert "run: expected a folder of a run with checkpoints" in capsys.readouterr().err


def test_words_in_any_order_and_from_stdin(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert main(["steps=7", "--check", "debug", "seed=3"]) == 0
    assert {"steps: 7", "seed: 3"} <= set(capsys.readouterr().out.splitlines())
    monkeypatch.setattr("sys.stdin", io.StringIO((ROOT / "configs" / "debug.yaml").read_text()))
    assert main(["-", "--check", "--out", str(tmp_path)]) == 0
    assert f"out: {tmp_path}" in capsys.readouterr().out.splitlines()
    for arguments, message in [
        (["debug", "demo"], "CONFIG: expected one file or name"),
        (["steps=3"], "CONFIG: expected one file or name, got none"),
        (["debug", "--size", "64"], "--size: expected --preset beside it"),
        (["debug", "--preset", "small"], "CONFIG: expected none beside --preset"),
        (["--preset", "small", "--images", str(tmp_path / "none"), "--check"], "--images: expected a folder"),
        (["--preset", "mar", "--codebook", "64", "--check"], "--codebook: expected none with this preset"),
        (["nothing"], "NAME: expected one of"),
        (["debug", "objective.loss.weights.edges=1", "--check"], "expected a term of this tokenflow model"),
    ]:
        assert main(arguments) == 2, arguments
        assert message in capsys.readouterr().err
    assert main([]) == 2
    assert main(["--preset", "nonsense"]) == 2


def test_a_loss_from_a_file_of_the_caller(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "edges_of_a_test.py"
    file.write_text(
        "import tokenizers_mm as tmm\n@tmm.register('loss', 'edges')\ndef edges(x, output):\n"
        "    return (x.diff(dim=-1) - output.image.diff(dim=-1)).abs().mean()\n"
    )
    command = ["debug", f"out={tmp_path / 'run'}", "steps=1", *QUICK, "objective.loss.weights.edges=0.5"]
    with kept_tables():
        assert main(command) == 2, "without the file there is no such term"
        assert "objective.loss.weights.edges: expected a term of this tokenflow model" in capsys.readouterr().err
        assert main([*command, "--import", str(file)]) == 0
        (line,) = [line for line in read_log(tmp_path / "run" / "log.jsonl") if "loss" in line]
        assert line["edges"] > 0
        AcceleratorState._reset_state(True)
        LOSSES["codebook"] = LOSSES["edges"]
        assert main(["debug", f"out={tmp_path / 'other'}", "steps=1", *QUICK]) == 2
        assert "a registered loss with a name of its own" in capsys.readouterr().err


def test_help_shows_every_key(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    said = capsys.readouterr().out
    for words in ("--preset", "batch_size: whole number, at least 1 [8]", "samples of a micro-batch", "gan_start"):
        assert words in said
    page = markdown()
    for title, schema in sections():
        assert f"## {title}" in page
        for key in keys_of(schema):
            assert f"{key.name}: " in said


def test_meanings_come_from_docstrings() -> None:
    class Example:
        """Something. width: of the layer; depth, height: both of the block (at least 1). `kind`: one of two: a or b."""

    import dataclasses

    schema = dataclasses.make_dataclass("Example", ["width", "depth", "height", "kind", "other"])
    schema.__doc__ = Example.__doc__
    assert meanings_of(schema) == {
        "width": "of the layer",
        "depth": "both of the block (at least 1)",
        "height": "both of the block (at least 1)",
        "kind": "one of two: a or b",
    }


def test_every_key_has_a_meaning() -> None:
    """A key without one: say it in the docstring of its class as `name: meaning.`"""
    assert not [f"{title}: {key.name}" for title, schema in sections() for key in keys_of(schema) if not key.meaning]


def test_time_left_is_that_of_the_clock() -> None:
    now = [0.0]
    pace = Pace(lambda: now[0], window=10)
    pace.note(5)
    assert pace.left(100) is None
    assert pace.left(100, limit=30.0) == 30.0
    for step in range(6, 26):
        now[0] += 1.0 if step < 16 else 3.0
        pace.note(step)
    assert pace.left(100) == pytest.approx(75 * 3.0), "the last ten steps count"
    assert pace.left(100, limit=50.0) == 50.0
    assert pace.left(25) == 0.0


def test_the_end_is_told_from_the_log() -> None:
    lines: list[dict[str, Any]] = [
        {"step": 1, "seconds": 1.0, "loss": 2.0, "psnr": None},
        {"step": 2, "seconds": 2.0, "loss": 1.0, "psnr": 20.0},
        {"step": 2, "validation_psnr": 19.0},
        {"step": 3, "seconds": 3.0, "loss": 0.5, "psnr": 21.0},
        {"step": 3, "latent_scale": 2.0},
    ]
    assert curves_of(lines) == {"loss": [(1, 2.0), (2, 1.0), (3, 0.5)], "psnr": [(2, 20.0), (3, 21.0)]}
    staged = [{"step": step, "stage": step // 3, "loss": 1.0} for step in range(1, 6)]
    assert {name: len(points) for name, points in curves_of(staged).items()} == {"loss": 3, "stage 0 loss": 2}
    assert last_lines(lines) == [lines[3], lines[2]]
    assert last_lines([]) == []
