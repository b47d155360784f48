"""Encoding of many images: memory, order and names; ids of every kind of integer at the borders."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from benchmarks.tiny import dualvitok_config as tiny_dualvitok
from benchmarks.tiny import tokenflow_config as tiny_tokenflow
from tokenizers_mm import _images
from tokenizers_mm._check import describe
from tokenizers_mm._images import Fit
from tokenizers_mm.eval.base import Setup
from tokenizers_mm.eval.candidates import Ours
from tokenizers_mm.eval.images import ImageSource
from tokenizers_mm.eval.protocols import protocol_by_name
from tokenizers_mm.eval.run import begin
from tokenizers_mm.models import DualViTok, TokenFlow, base
from tokenizers_mm.types import ImageCodes, Stream


@pytest.fixture(scope="module")
def tokenizer() -> TokenFlow:
    torch.manual_seed(0)
    return TokenFlow.from_config(tiny_tokenflow()).eval()


@pytest.fixture(scope="module")
def any_size() -> DualViTok:
    torch.manual_seed(0)
    return DualViTok.from_config(tiny_dualvitok()).eval()


def noise(seed: int, size: tuple[int, int]) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8))


class Opened:
    """Counts the images that are open or wait at the same time."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, module: Any, name: str) -> None:
        self.now = self.most = self.total = 0
        original = getattr(module, name)

        def counted(*arguments: Any) -> Image.Image:
            self.now += 1
            self.total += 1
            self.most = max(self.most, self.now)
            return original(*arguments)

        monkeypatch.setattr(module, name, counted)

    def forget(self, count: int) -> None:
        self.now -= count


def test_a_list_is_encoded_a_few_images_at_a_time(
    tokenizer: TokenFlow, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    paths = []
    for index in range(120):
        paths.append(tmp_path / f"{index:03d}.png")
        noise(index % 7, (32, 32)).save(paths[-1])
    opened = Opened(monkeypatch, base, "open_image")
    encode = TokenFlow.encode_tensor

    def counted(self: TokenFlow, x: torch.Tensor) -> ImageCodes:
        opened.forget(len(x))
        return encode(self, x)

    monkeypatch.setattr(TokenFlow, "encode_tensor", counted)
    limit = 16
    monkeypatch.setitem(base.BATCH_PIXELS, "cpu", limit * 32**2)
    codes = tokenizer.encode(paths)
    assert isinstance(codes, ImageCodes)
    assert codes.ids.shape == (120, 21)
    assert opened.most <= limit + 1
    for index in range(120):
        assert torch.equal(codes.ids[index], codes.ids[index % 7])


def test_many_sizes_wait_within_a_limit_and_keep_their_order(
    any_size: DualViTok, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(base.BATCH_PIXELS, "cpu", 64 * 64)
    sizes = [(32 * (1 + index % 5), 32 * (1 + index % 3)) for index in range(40)]
    images = [noise(index, size) for index, size in enumerate(sizes)]
    held, most = 0, 0
    opened = base.open_image

    def counted(item: Any, name: str = "image") -> Image.Image:
        nonlocal held, most
        image = opened(item, name)
        if name != "image" and name.startswith("images["):
            held += image.width * image.height
            most = max(most, held)
        return image

    def items() -> Iterator[tuple[list[int], Any]]:
        nonlocal held
        for indices, codes in any_size.encode_batches(images):
            held -= len(indices) * codes.height * codes.width
            yield indices, codes

    monkeypatch.setattr(base, "open_image", counted)
    found = {index: codes for indices, batch in items() for index, codes in zip(indices, batch.unbind(), strict=True)}
    assert most <= (base.WAITING_BATCHES + 1) * 64 * 64 + 160 * 96
    for index, (size, image) in enumerate(zip(sizes, images, strict=True)):
        assert (found[index].height, found[index].width) == size
        alone = any_size.encode_tensor(_images.image_to_tensor(image)[None])
        assert float((alone.ids == found[index].ids).double().mean()) > 0.99


def test_an_image_of_a_wrong_size_is_named(tokenizer: TokenFlow, tmp_path: Path) -> None:
    noise(0, (32, 32)).save(tmp_path / "good.png")
    noise(0, (20, 32)).save(tmp_path / "small.png")
    with pytest.raises(ValueError, match=r"^image .*small\.png: expected 32 x 32 pixels, got 20 x 32"):
        tokenizer.encode([tmp_path / "good.png", tmp_path / "small.png"])
    with pytest.raises(ValueError, match=r"^images\[1\]: expected 32 x 32 pixels, got 20 x 32 \(or choose a fit"):
        tokenizer.encode([noise(0, (32, 32)), noise(0, (20, 32))])
    with pytest.raises(ValueError, match=r"^images\[1\]: expected 32 x 32 pixels, got 20 x 32 \(or choose a fit"):
        tokenizer.reconstruct([noise(0, (32, 32)), noise(0, (20, 32))])


@pytest.mark.parametrize("fit", ["crop", "pad", "resize"])
def test_an_image_that_cannot_be_fitted_is_named(
    fit: Fit, tmp_path: Path, any_size: DualViTok, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By whatever opens a file and brings it to a size."""
    path = tmp_path / "thin.png"
    Image.new("RGB", (60_000, 1)).save(path)
    protocol = protocol_by_name("default", fit)
    source = ImageSource.at(str(tmp_path))
    measured = begin([Ours("tiny", any_size)], source, Setup(protocol), ["psnr"])
    attempts: list[Callable[[], Any]] = [
        lambda: any_size.encode([path], fit),
        lambda: any_size.prepare(path, fit),
        lambda: any_size.reconstruct(path, fit=fit),
        lambda: measured.prepare(source.read(0).image, str(path)),
    ]
    monkeypatch.setattr(_images, "MAX_CANVAS", 1000)
    for attempt in attempts:
        with pytest.raises(ValueError, match=f"^image {path}: expected "):
            attempt()


KINDS = ("list", "tuple", "int32", "uint8", "uint16", "int16", "numpy int64", "numpy uint16", "numpy int32", "tensors")


@pytest.mark.parametrize("kind", KINDS)
def test_ids_of_every_kind_of_integer_decode_alike(tokenizer: TokenFlow, kind: str) -> None:
    ids = torch.arange(42).reshape(2, 21)
    made: Any = {
        "list": ids.tolist(),
        "tuple": tuple(map(tuple, ids.tolist())),
        "tensors": list(ids),
        **{name: ids.to(getattr(torch, name)) for name in ("int32", "uint8", "uint16", "int16")},
        **{f"numpy {name}": ids.numpy().astype(name) for name in ("int64", "uint16", "int32")},
    }[kind]
    with torch.no_grad():
        assert torch.equal(tokenizer.decode_ids(made), tokenizer.decode_ids(ids))
    codes = ImageCodes(made, 32, 32, tokenizer.streams(32, 32))
    assert codes.ids.dtype == torch.int64
    assert torch.equal(codes.ids, ids)


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        (torch.zeros(1, 21), r"expected int64 \[B, 21\].* got float32 \[1, 21\]"),
        (torch.zeros(1, 21, dtype=torch.bool), "got bool"),
        (np.zeros((1, 21)), "got float64"),
        (np.zeros((1, 21), dtype=bool), "got bool"),
        ([[0.5] * 21], "got float64"),
        ([[True] * 21], "got bool"),
        ([[0] * 21, [0] * 20], "got"),
        ([["a"] * 21], "got"),
        ([[2**63] * 21], "got"),
        ([[2**70] * 21], "got"),
        ([[]], "got"),
        (None, "got"),
        ([[-100] + [0] * 20], "values from -100 to"),
        ([[64] + [0] * 20], "expected values from 0 to 63"),
        (torch.full((1, 21), 2**62), "expected values from 0 to 63"),
        ([[0] * 73_000], r"got int64 \[1, 73000\]"),
        ([list(range(70_000)), [0]], "got"),
    ],
)
def test_ids_that_are_none_are_one_short_sentence(tokenizer: TokenFlow, ids: Any, message: str) -> None:
    with pytest.raises(ValueError, match=rf"^ids.*: expected .*{message}|^ids.*{message}") as raised:
        tokenizer.decode_ids(ids)
    assert len(str(raised.value)) < 400
    assert "\n" not in str(raised.value)


def test_described_values_are_short() -> None:
    values: list[Any] = [
        list(range(100_000)),
        {str(index): "x" * 1000 for index in range(1000)},
        "x" * 100_000,
        b"x" * 100_000,
        [["x" * 500] * 50] * 50,
        np.zeros((1000, 1000)),
        torch.zeros(1000, 1000),
        10**5000,
        (Stream("a", 8, ((1, 1),) * 3000),),
        "two\nlines\x1b[31m",
    ]
    for value in values:
        assert len(describe(value)) <= 200
        assert describe(value).isprintable()
