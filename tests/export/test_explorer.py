"""The explorer page: its data, its decoder, and, where a browser is installed, what a visitor sees."""

import base64
import gzip
import io
import json
import os
import re
import shutil
import subprocess
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from benchmarks.tiny import dualvitok_config as tiny_dualvitok
from benchmarks.tiny import tokenflow_config as tiny_config
from tokenizers_mm._images import tensor_to_images
from tokenizers_mm.checkpoints.store import load
from tokenizers_mm.cli import main
from tokenizers_mm.export.explorer import (
    BINARY,
    BUNDLE,
    _as_url,
    decoder_graph,
    explore,
    lengths,
    page,
    page_data,
    runtime_files,
    script,
)
from tokenizers_mm.models import DualViTok, TokenFlow
from tokenizers_mm.types import ImageCodes

ROOT = Path(__file__).resolve().parents[2]
MODULES = [Path(part) for part in os.environ.get("NODE_PATH", "").split(os.pathsep) if part] + [ROOT / "node_modules"]
PACKAGES = {
    name: next((m / name for m in MODULES if (m / name).is_dir()), None)
    for name in ("onnxruntime-web", "puppeteer-core")
}
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
NODE = shutil.which("node")
needs_onnx = pytest.mark.skipif(find_spec("onnxruntime") is None or find_spec("onnxscript") is None, reason="no ONNX")


@pytest.fixture(scope="module")
def tokenizer() -> TokenFlow:
    torch.manual_seed(0)
    return TokenFlow.from_config(tiny_config()).eval()


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Five images of 90 x 70 pixels with a name that would end a script."""
    folder = tmp_path_factory.mktemp("images")
    random = np.random.default_rng(0)
    paths = [folder / f"{index} <!-- <script>.png" for index in range(5)]
    for path in paths:
        small = Image.fromarray(random.integers(0, 255, (7, 9, 3), dtype=np.uint8))
        small.resize((90, 70), Image.Resampling.BICUBIC).save(path)
    return paths


@pytest.fixture
def runtime(tmp_path: Path) -> Path:
    """A folder in the place of the npm package."""
    dist = tmp_path / "onnxruntime-web" / "dist"
    dist.mkdir(parents=True)
    (dist / BUNDLE).write_text("export {}")
    (dist / BINARY).write_bytes(bytes(range(256)))
    return dist.parent


def unpack(text: str) -> dict[str, bytes]:
    """Values by key that the page reads from a script, uncompressed."""
    found = re.findall(r'\.(\w+) = "([A-Za-z0-9+/=]*)";', text)
    return {name: gzip.decompress(base64.b64decode(value)) for name, value in found}


def decoded(graph: bytes, ids: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """The image that the ONNX graph makes."""
    import onnxruntime

    session = onnxruntime.InferenceSession(graph)
    names = [entry.name for entry in session.get_inputs()]
    (image,) = session.run(None, dict(zip(names, (ids.numpy(), weights.numpy()), strict=True)))
    return torch.from_numpy(image)


def test_the_page_holds_images_and_ids(tokenizer: TokenFlow, images: list[Path]) -> None:
    facts = page_data(tokenizer, "tiny", images, "crop", (32, 32))
    text = page(facts)
    assert text.count("<script") == text.count("</script>") == 2
    assert not re.search(r"/\*(STYLE|CODE|DATA)\*/", text)
    (held,) = re.findall(r'<script type="application/json" id="data">(.*?)</script>', text, re.S)
    data = json.loads(held)
    assert data == facts
    codes = tokenizer.encode(images, fit="crop")
    assert [image["ids"] for image in data["images"]] == codes.ids.tolist()
    assert [image["name"] for image in data["images"]] == [path.stem for path in images]
    assert data["streams"] == [
        {"name": "shared", "size": codes.streams[0].codebook_size, "grids": [[1, 1], [2, 2], [4, 4]]}
    ]
    assert data["lengths"] == [1, 5, 21]
    decoded = Image.open(io.BytesIO(base64.b64decode(data["images"][0]["source"].split(",")[1])))
    assert decoded.size == (32, 32)


def test_sixty_four_images_stay_under_five_megabytes(tokenizer: TokenFlow, images: list[Path]) -> None:
    """At 256 x 256 pixels, with as many ids as TokenFlow has there."""
    facts = page_data(tokenizer, "tiny", images, "crop", (32, 32))
    random = np.random.default_rng(0)
    large = Image.fromarray(random.integers(0, 255, (32, 32, 3), dtype=np.uint8)).resize(
        (256, 256), Image.Resampling.BICUBIC
    )
    entry = {"name": "a name of common length.png", "source": _as_url(large), "ids": [32767] * 680}
    assert len(page({**facts, "images": [entry] * 64})) < 5e6


@needs_onnx
@pytest.mark.filterwarnings("ignore")  # of the exporter's own making
def test_the_command_writes_a_page_that_decodes_up_to_each_scale(
    tokenizer: TokenFlow, images: list[Path], runtime: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tokenizer.save(tmp_path / "tok")
    (tmp_path / "broken.png").write_bytes(b"no image")
    listed = [str(tmp_path / "broken.png"), str(images[0].parent)]
    arguments = ["explore", str(tmp_path / "tok"), "--images", *listed, "--limit", "4"]
    assert main([*arguments, "--runtime", str(runtime), "--out", str(tmp_path / "page")]) == 0
    assert sorted(path.name for path in (tmp_path / "page").iterdir()) == ["decoder.js", "index.html", "runtime.js"]
    assert (tmp_path / "page" / "index.html").read_text().count('"ids":') == 3
    assert capsys.readouterr().err.startswith(f"skipped: image {tmp_path / 'broken.png'}: ")
    files = unpack((tmp_path / "page" / "runtime.js").read_text())
    assert files == {"module": b"export {}", "binary": bytes(range(256))}
    graph = unpack((tmp_path / "page" / "decoder.js").read_text())["decoder"]
    codes = tokenizer.encode(images[0], fit="crop")
    for index, length in enumerate(lengths(codes.streams)):
        expected = tokenizer.decode(ImageCodes(codes.ids[:, :length], 32, 32, codes.streams))
        torch.testing.assert_close(decoded(graph, codes.ids, torch.eye(3)[index]), expected, atol=1e-4, rtol=0)


@needs_onnx
@pytest.mark.filterwarnings("ignore")
def test_several_streams_of_any_size(images: list[Path], tmp_path: Path) -> None:
    torch.manual_seed(0)
    tokenizer = DualViTok.from_config(tiny_dualvitok()).eval()
    size = (64, 96)
    facts = page_data(tokenizer, "tiny", images[:2], "resize", size)
    streams = tokenizer.streams(*size)
    assert [stream["name"] for stream in facts["streams"]] == ["semantic", "pixel"]
    assert facts["lengths"] == [sum(stream.num_ids for stream in streams)]
    ids = torch.tensor([facts["images"][1]["ids"]])
    image = decoded(decoder_graph(tokenizer, size, tmp_path / "decoder.onnx"), ids, torch.ones(1))
    torch.testing.assert_close(image, tokenizer.decode_ids(ids, *size), atol=1e-4, rtol=0)
    with pytest.raises(ValueError, match="size: expected the height and width of the images, got nothing"):
        explore(tokenizer, "tiny", images, tmp_path / "x")


def test_bad_requests_get_one_sentence(
    tokenizer: TokenFlow, images: list[Path], runtime: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(
        ValueError, match=r"runtime: expected the folder of the npm package onnxruntime-web .* got no node_modules"
    ):
        explore(tokenizer, "tiny", images, tmp_path / "x")
    with pytest.raises(ValueError, match="expected a file of onnxruntime-web"):
        explore(tokenizer, "tiny", images, tmp_path / "x", runtime=tmp_path)
    with pytest.raises(ValueError, match="images: expected at least one readable image, got none of 5"):
        explore(tokenizer, "tiny", images, tmp_path / "x", "refuse", runtime=runtime, refused=lambda error: None)
    with pytest.raises(ValueError, match="images: expected 1 to 256, got 0"):
        explore(tokenizer, "tiny", [], tmp_path / "x", runtime=runtime)
    with pytest.raises(ValueError, match="expected 32 x 32 pixels, got 70 x 90"):
        explore(tokenizer, "tiny", images, tmp_path / "x", fit="refuse", runtime=runtime)
    assert not (tmp_path / "x").exists()
    (tmp_path / "node_modules").mkdir()
    runtime.rename(tmp_path / "node_modules" / "onnxruntime-web")
    (tmp_path / "below").mkdir()
    monkeypatch.chdir(tmp_path / "below")
    assert unpack(script(runtime_files(None)))["module"] == b"export {}"


def pixels(image: torch.Tensor) -> np.ndarray:
    return np.asarray(tensor_to_images(image)[0]).astype(int)


@needs_onnx
@pytest.mark.filterwarnings("ignore")
@pytest.mark.skipif(NODE is None or CHROMIUM is None, reason="node and chromium are not installed")
@pytest.mark.skipif(
    None in PACKAGES.values(), reason=f"npm packages {list(PACKAGES)} are not in NODE_PATH or node_modules"
)
def test_in_the_browser(images: list[Path], tmp_path: Path) -> None:
    """The shipped tokenizer: a swap, a coarse image and an undo give the pixels of the Python decoder; nothing is
    fetched; no serious finding of axe, where it is installed; nothing wider than the window."""
    tokenizer = load("tokenizers_mm/demo-64")
    index = explore(tokenizer, "demo", images, tmp_path / "page", runtime=PACKAGES["onnxruntime-web"])
    grid, a, b, upto = 4, 27, 44, 2
    plan = json.dumps({"grid": grid, "a": a, "b": b, "upto": upto})
    command = [str(NODE), str(Path(__file__).with_name("drive_page.cjs")), str(index), str(CHROMIUM), plan]
    environment = {**os.environ, "NODE_PATH": os.pathsep.join(map(str, MODULES))}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    seen = json.loads(done.stdout)
    assert seen["errors"] == []
    assert set(seen["requests"]) <= {"file:", "data:", "blob:"}
    assert seen["options"] == len(images)

    codes = tokenizer.encode(images[:2], fit="crop")
    start, side = sum(rows * columns for rows, columns in codes.streams[0].grids[:grid]), 8
    swapped = codes.ids.clone()
    swapped[0, start + a], swapped[1, start + b] = codes.ids[1, start + b], codes.ids[0, start + a]
    ends = lengths(codes.streams)
    expected = {"plain": codes.ids, "swapped": swapped, "coarse": swapped[:, : ends[upto - 1]], "reset": codes.ids}
    shown = {}
    for name, ids in expected.items():
        for row, panel in enumerate("ab"):
            shown[name, panel] = np.array(seen["images"][f"{name} {panel}"]).reshape(64, 64, 4)[..., :3]
            image = tokenizer.decode(ImageCodes(ids[row : row + 1], 64, 64, codes.streams))
            assert np.abs(shown[name, panel] - pixels(image)).max() <= 2, (name, panel)
    for panel, place in (("a", a), ("b", b)):
        change = np.abs(shown["swapped", panel] - shown["plain", panel]).sum(-1)
        top, left = (64 // side * part for part in divmod(place, side))
        near = change[max(0, top - 8) : top + 16, max(0, left - 8) : left + 16]
        assert change[top : top + 8, left : left + 8].max() == change.max() > 20
        assert near.sum() > 0.6 * change.sum()
    assert sorted(seen["changed"]) == sorted([a, b])

    code = codes.ids[0, start + a]
    places = (torch.stack([tokenizer.encode(path, fit="crop").ids[0] for path in images]) == code).sum(1)
    assert seen["where"].startswith(f"{int(places.sum())} place")
    assert f"in {int((places > 0).sum())} image" in seen["where"]
    assert seen["same"] == (codes.ids[0, start:] == code).nonzero()[:, 0].tolist()
    assert seen["focused"].startswith(f"row {b // side + 1}, column {b % side}, code ")
    for name, width in seen["widths"].items():
        assert width <= int(name.split()[1]), name
    assert [finding for finding in seen["axe"] or [] if finding.startswith(("serious", "critical"))] == []
