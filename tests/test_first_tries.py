"""Mistakes that people make in their first hour: each is one sentence that says what to do instead."""

import argparse
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from benchmarks.tiny import dualvitok_config, tokenflow_config
from tokenizers_mm import load
from tokenizers_mm.cli import main, parser
from tokenizers_mm.models import DualViTok, TokenFlow


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with a tokenizer for 32 x 32 pixels, a tokenizer for any size, an image and its ids."""
    place = tmp_path_factory.mktemp("tries")
    torch.manual_seed(0)
    TokenFlow.from_config(tokenflow_config()).save(place / "run" / "tokenizer")
    DualViTok.from_config(dualvitok_config()).save(place / "any")
    levels = np.random.default_rng(0).integers(0, 256, (40, 32, 3), dtype=np.uint8)
    Image.fromarray(levels).save(place / "a.png")
    (place / "file").write_text("x")
    encode = ["encode", str(place / "a.png"), "--fit", "crop", "--tokenizer", str(place / "run" / "tokenizer")]
    assert main([*encode, "--out", str(place / "ids.npz")]) == 0
    return place


def said(capsys: pytest.CaptureFixture[str], code: int, *arguments: object) -> str:
    capsys.readouterr()
    assert main([str(argument) for argument in arguments]) == code
    told = capsys.readouterr()
    return told.err if code else told.out


def test_a_run_in_the_place_of_its_tokenizer(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    told = f"{place / 'run'} (the one of this run is {place / 'run' / 'tokenizer'})"
    assert told in said(capsys, 2, "info", place / "run")
    assert told in said(capsys, 2, "encode", place / "a.png", "--tokenizer", place / "run", "--out", place / "x.npz")


def test_a_tokenizer_of_another_size(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = place / "decoded"
    told = said(capsys, 2, "decode", place / "ids.npz", "--tokenizer", "tokenizers_mm/demo-64", "--out-dir", out)
    assert "expected ids of this tokenizer, tokenflow:" in told
    assert not out.exists()


@pytest.mark.parametrize("below", [".", "inside"])
def test_a_file_in_the_place_of_a_folder(place: Path, below: str, capsys: pytest.CaptureFixture[str]) -> None:
    folder, tokenizer = place / "file" / below, ["--tokenizer", place / "run" / "tokenizer"]
    expected = f"output {folder}: expected a folder or a new name, got a file: {place / 'file'}"
    assert expected in said(capsys, 2, "decode", place / "ids.npz", *tokenizer, "--out-dir", folder)
    assert expected in said(capsys, 2, "tokenize", place / "a.png", *tokenizer, "--fit", "crop", "--out", folder)


def test_other_options_for_a_run_that_is_there(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["tokenize", place / "a.png", "--tokenizer", place / "run" / "tokenizer", "--out", place / "shards"]
    assert said(capsys, 0, *command, "--fit", "crop").startswith(f"{place / 'shards'}: 1 image\n")
    assert "got another fit (crop)" in said(capsys, 2, *command, "--fit", "pad")
    assert "got another stable (True)" in said(capsys, 2, *command, "--fit", "crop", "--no-stable")
    assert "got another shard_size (1000)" in said(capsys, 2, *command, "--fit", "crop", "--shard-size", "7")


def test_info_counts_the_codes_of_a_tokenizer_for_any_size(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    told = said(capsys, 0, "info", place / "any")
    for name, quantizer in DualViTok.from_config(dualvitok_config()).quantizers().items():
        assert f"stream       {name}: {quantizer.codebook_size} codes\n" in told


def test_every_option_says_what_it_does_and_its_default() -> None:
    verbs = next(action for action in parser()._actions if isinstance(action, argparse._SubParsersAction))
    for verb, command in verbs.choices.items():
        for action in command._actions:
            name = f"{verb} {'/'.join(action.option_strings) or action.dest}"
            assert action.help, name
            told = action.default in (None, False, True, "", [], argparse.SUPPRESS) or "%(default)s" in action.help
            assert told, f"{name}: {action.default}"


def test_plain_ids_in_the_place_of_codes(place: Path) -> None:
    for folder in (place / "run" / "tokenizer", place / "any"):
        tokenizer = load(folder)
        codes = tokenizer.encode(torch.zeros(1, 3, 32, 32))
        for call in (tokenizer.decode, tokenizer.vectors):
            with pytest.raises(ValueError, match=r"codes: expected ImageCodes, .* \(plain ids: decode_ids\), got"):
                call(codes.ids)


def test_a_loss_of_ones_own_that_is_no_number() -> None:
    pytest.importorskip("accelerate")
    from train.objectives.terms import _scalar

    assert _scalar("mine", torch.ones(1, 1)).shape == ()
    for wrong in (torch.ones(2), 3.0, None):
        with pytest.raises(ValueError, match="loss term mine: expected a tensor of one number, got"):
            _scalar("mine", wrong)
