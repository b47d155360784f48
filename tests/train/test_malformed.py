"""Malformed files among the images: training goes on, and each is counted once in a pass, by its cause."""

import os
import random
import struct
import zlib
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest
import yaml
from PIL import Image

from tests.cases import ROOT
from train.config import parse_config
from train.log import _cause, read_log
from train.loop import run

PER_KIND = 3
GOOD = 60


def image_file(rng: random.Random, kind: str) -> bytes:
    buffer = BytesIO()
    Image.frombytes("RGB", (16, 16), rng.randbytes(768)).save(buffer, kind)
    return buffer.getvalue()


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def huge_png(width: int, height: int) -> bytes:
    """A small file whose header tells of many pixels."""
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(bytes(1000))) + chunk(b"IEND", b"")


def malformed(rng: random.Random) -> dict[str, tuple[bytes, str]]:
    """Names, contents and causes of files that no decoder takes."""
    png, jpeg = image_file(rng, "PNG"), image_file(rng, "JPEG")
    return {
        "short.png": (png[: -rng.randrange(20, 700)], "OSError"),
        "short.jpg": (jpeg[: -rng.randrange(5, 150)], "OSError"),
        "empty.png": (b"", "UnidentifiedImageError"),
        "text.jpg": (b"no image, but a text\n" * 3, "UnidentifiedImageError"),
        "archive.png": (b"PK\x03\x04" + rng.randbytes(300), "UnidentifiedImageError"),
        "noise.webp": (rng.randbytes(400), "UnidentifiedImageError"),
        "huge.png": (huge_png(60_000 + rng.randrange(5000), 60_000), "DecompressionBombError"),
    }


def make_folder(folder: Path) -> dict[str, int]:
    """Good and malformed files; returns how many there are of each cause."""
    rng, counts = random.Random(0), dict[str, int]()
    for index in range(GOOD):
        (folder / f"{index:03}.{'jpg' if index % 2 else 'png'}").write_bytes(image_file(rng, "PNG"))
    for index in range(PER_KIND):
        place = folder / f"{index}.png"
        place.mkdir()  # a folder with the name of an image: not listed
        for name, (data, cause) in malformed(rng).items():
            (place / name).write_bytes(data)
            counts[cause] = counts.get(cause, 0) + 1
        os.mkfifo(place / "pipe.png")
        (place / "gone.png").symlink_to("nowhere")
        for cause in ("a_FIFO", "no_such_file"):
            counts[cause] = counts.get(cause, 0) + 1
    return counts


@pytest.mark.parametrize("edits", [{}, {"image_size": None, "buckets": {"min_pixels": 256, "max_pixels": 256}}])
def test_malformed_files_are_counted_once_in_a_pass(edits: dict[str, Any], one_thread: None, tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    counts = make_folder(tmp_path / "images")
    size = GOOD + sum(counts.values())
    part = {
        "channels": 8,
        "multipliers": [1],
        "num_blocks": 1,
        "attention_levels": [],
        "middle": False,
        "num_groups": 4,
    }
    data = yaml.safe_load((ROOT / "configs" / "vqgan_small.yaml").read_text())
    data |= {
        "out": str(tmp_path / "run"),
        "batch_size": 6,
        "log_every": 4,
        "sample_every": 0,
        "save_every": 0,
        "ema": 0.0,
    }
    data |= {"steps": 2 * size // 6 if not edits else 40}
    objective = data["objective"]
    objective["model"]["config"] = {
        "encoder": {"out_channels": 8, "stem_patch": 4, **part},
        "quantizer": {"kind": "vq", "codebook_size": 32, "dim": 4},
        "decoder": {"in_channels": 8, "head_patch": 4, **part},
    }
    objective["data"] = {
        "sources": [{"kind": "folder", "path": str(tmp_path / "images")}],
        "image_size": [16, 16],
    } | edits
    objective["data"] = {key: value for key, value in objective["data"].items() if value is not None}
    assert run(parse_config(data)).step == data["steps"]
    found: dict[str, float] = {}
    for line in read_log(tmp_path / "run" / "log.jsonl"):
        for name, value in line.items():
            if name.startswith("skipped"):
                found[name] = found.get(name, 0.0) + value
    if edits:  # headers are read once, before the first step; what is broken behind its header, in each pass
        once = {cause: float(count) for cause, count in counts.items() if cause != "OSError"}
        assert {cause: found[f"skipped_{cause}"] for cause in once} == once
        assert found["skipped_OSError"] > 2 * PER_KIND
    else:
        assert found == {"skipped": 2.0 * (size - GOOD)} | {f"skipped_{c}": 2.0 * n for c, n in counts.items()}


@pytest.mark.parametrize(
    ("sentence", "cause"),
    [
        ("image a, got b.png: expected a readable image, got OSError: image file is truncated", "OSError"),
        ("image a.png: expected an image file, got a FIFO", "a_FIFO"),
        ("image a.png: expected at most 268435456 pixels, got 60000 x 60001", "not_at_most_268435456_pixels"),
        ("caption a.txt: expected UTF-8, got 0xff at byte 3", "not_UTF_8"),
        ("caption a.txt: expected a text file, got Permission denied", "Permission_denied"),
    ],
)
def test_a_cause_has_no_sizes_and_no_names_of_files(sentence: str, cause: str) -> None:
    assert _cause(sentence) == cause
