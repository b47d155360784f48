"""Images in: every mode, size and state of a file that people have; one ValueError, with the name, for the rest."""

import io
import os
import random
import struct
import threading
import tracemalloc
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageCms, PngImagePlugin

from tests.data.test_buckets import stored
from tokenizers_mm import _images
from tokenizers_mm.data.buckets import AnySize, BucketConfig, Draw, random_cut
from tokenizers_mm.data.transforms import center_crop, random_crop, random_patch


def ramp(height: int = 24, width: int = 32) -> np.ndarray:
    """RGB bytes in which every pixel is another, [height, width, 3]."""
    y, x = np.mgrid[:height, :width]
    return np.stack([y * 255 // (height - 1), x * 255 // (width - 1), (x + y) * 3 % 256], -1).astype(np.uint8)


def pixels(image: Image.Image) -> np.ndarray:
    assert image.mode == "RGB"
    return np.asarray(image)


def exif(orientation: int) -> bytes:
    tags = Image.Exif()
    tags[_images.ORIENTATION] = orientation
    tags[0x010F] = "a maker"
    return tags.tobytes()


def same_from_path_and_object(path: Path) -> np.ndarray:
    from_path = pixels(_images.read_image(path))
    with Image.open(path) as opened:
        assert np.array_equal(pixels(_images.open_image(opened)), from_path)
        tensor = _images.image_to_tensor(opened)
    assert np.array_equal(pixels(_images.tensor_to_images(tensor[None])[0]), from_path)
    assert _images.read_size(path) == from_path.shape[:2]
    return from_path


def test_pixels_survive_the_round_trip() -> None:
    array = np.arange(256, dtype=np.uint8).reshape(16, 16, 1).repeat(3, 2)
    x = _images.image_to_tensor(Image.fromarray(array))
    assert (float(x.min()), float(x.max())) == (-1.0, 1.0)
    assert np.array_equal(np.asarray(_images.tensor_to_images(x[None])[0]), array)
    far = _images.tensor_to_images(torch.full((1, 3, 2, 2), 7.0))[0]
    assert far.getpixel((0, 0)) == (255, 255, 255)
    with pytest.raises(ValueError, match="x: expected finite values"):
        _images.tensor_to_images(torch.full((1, 3, 2, 2), torch.nan))


@pytest.mark.parametrize("suffix", ["png", "jpg", "tif", "webp"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_orientation_is_applied_once_to_files_and_objects(tmp_path: Path, suffix: str, orientation: int) -> None:
    """Expected pixels by plain array operations."""
    flat: dict[int, Callable[[np.ndarray], np.ndarray]] = {
        1: lambda a: a,
        2: lambda a: a[:, ::-1],
        3: lambda a: a[::-1, ::-1],
        4: lambda a: a[::-1],
        5: lambda a: a.swapaxes(0, 1),
        6: lambda a: np.rot90(a, -1),
        7: lambda a: np.rot90(a, 2).swapaxes(0, 1),
        8: lambda a: np.rot90(a),
    }
    path = tmp_path / f"a.{suffix}"
    options: dict[str, Any] = {"jpg": {"quality": 100, "subsampling": 0}, "webp": {"lossless": True}}.get(suffix, {})
    Image.fromarray(ramp()).save(path, exif=exif(orientation), **options)
    read = same_from_path_and_object(path)
    expected = flat[orientation](ramp())
    assert read.shape == expected.shape
    assert np.abs(read.astype(int) - expected).max() <= (8 if suffix == "jpg" else 0)
    again = _images.upright_rgb(Image.fromarray(read))
    assert np.array_equal(pixels(again), read)


MODES = ("1", "L", "P", "LA", "RGBA", "I;16")


@pytest.mark.parametrize(
    ("suffix", "mode"), [*(("png", m) for m in MODES), *(("tif", m) for m in (*MODES, "CMYK", "F"))]
)
def test_orientation_is_applied_in_every_mode(tmp_path: Path, suffix: str, mode: str) -> None:
    """Files, their bytes and objects of modes that Pillow may map into memory: upright alike."""
    path = tmp_path / f"a.{suffix}"
    grey = Image.fromarray(ramp()).convert("L")
    made = Image.fromarray(np.asarray(grey).astype(np.uint16) * 257) if mode == "I;16" else grey.convert(mode)
    made.save(path, exif=exif(6))
    turned = same_from_path_and_object(path)
    assert np.array_equal(turned, pixels(_images.decode_image(path.read_bytes(), "image")))
    made.save(path)
    assert np.array_equal(turned, np.rot90(pixels(_images.read_image(path)), -1))


def raw_exif(kind: int, count: int, value: bytes) -> bytes:
    """An EXIF block with one entry, the orientation, of any type."""
    entry = struct.pack("<HHI", _images.ORIENTATION, kind, count) + value.ljust(4, b"\0")
    return b"Exif\0\0II*\0\x08\0\0\0\x01\0" + entry + bytes(4)


ASCII, SHORT, LONG, RATIONAL, FLOAT = 2, 3, 4, 5, 11


@pytest.mark.parametrize(
    "entry",
    [
        (ASCII, 2, b"6\0"),
        (SHORT, 1, b"\0\0"),
        (SHORT, 1, b"\x09\0"),
        (LONG, 1, b"\xff\xff\xff\xff"),
        (RATIONAL, 1, b"\xff\xff\0\0"),
        (FLOAT, 1, struct.pack("<f", 6.0)),
        (99, 1, b"\x06\0"),
    ],
)
def test_an_orientation_that_is_none_means_not_rotated(tmp_path: Path, entry: tuple[int, int, bytes]) -> None:
    Image.fromarray(ramp()).save(tmp_path / "a.png", exif=raw_exif(*entry))
    assert np.array_equal(pixels(_images.read_image(tmp_path / "a.png")), ramp())


@pytest.mark.parametrize(
    "broken", [b"", b"Exif\0\0", b"Exif\0\0MM\0*\0\0\0", b"Exif\0\0II*\0\xff\xff\xff\x7f", b"x" * 99]
)
def test_a_broken_exif_keeps_the_pixels(tmp_path: Path, broken: bytes) -> None:
    for name in ("a.png", "a.webp"):
        Image.fromarray(ramp()).save(tmp_path / name, exif=broken, lossless=True)
        assert np.array_equal(pixels(_images.read_image(tmp_path / name)), ramp())


@pytest.mark.parametrize("high", [1, 255, 257, 4095, 65535])
@pytest.mark.parametrize("suffix", ["png", "tif", "pgm"])
def test_sixteen_bits_by_a_rule_that_does_not_look_at_the_largest_value(tmp_path: Path, suffix: str, high: int) -> None:
    values = np.linspace(0, high, 64).astype(np.uint16).reshape(8, 8)
    path = tmp_path / f"a.{suffix}"
    if suffix == "pgm":
        path.write_bytes(b"P5 8 8 65535\n" + values.astype(">u2").tobytes())
    else:
        Image.fromarray(values).save(path)
    expected = np.rint(values / 257).astype(np.uint8)
    assert np.array_equal(same_from_path_and_object(path), expected[..., None].repeat(3, 2))


def test_float_and_integer_images_by_rule(tmp_path: Path) -> None:
    values = np.array([[0.0, 0.5, 1.0, 2.0, -1.0]], dtype=np.float32)
    Image.fromarray(values).save(tmp_path / "f.tif")
    assert same_from_path_and_object(tmp_path / "f.tif")[0, :, 0].tolist() == [0, 128, 255, 255, 0]
    Image.fromarray(np.array([[0, 257, 65535, 1 << 20, -5]], dtype=np.int32)).save(tmp_path / "i.tif")
    assert same_from_path_and_object(tmp_path / "i.tif")[0, :, 0].tolist() == [0, 1, 255, 255, 0]
    Image.fromarray(values * np.float32("nan")).save(tmp_path / "nan.tif")
    with pytest.raises(ValueError, match=r"nan\.tif: expected numbers as pixels, got NaN"):
        _images.read_image(tmp_path / "nan.tif")


def test_transparency_palettes_and_animations(tmp_path: Path) -> None:
    Image.new("RGBA", (4, 4), (255, 0, 0, 0)).save(tmp_path / "clear.png")
    Image.new("LA", (4, 4), (0, 128)).save(tmp_path / "half.png")
    Image.new("P", (4, 4)).save(tmp_path / "palette.png")
    Image.new("P", (4, 4)).save(tmp_path / "clear_palette.png", transparency=0)
    Image.new("RGB", (4, 4), (9, 9, 9)).save(tmp_path / "key.png", transparency=(9, 9, 9))
    Image.new("L", (4, 4), 9).save(tmp_path / "grey_key.png", transparency=9)
    Image.fromarray(np.full((4, 4), 999, np.uint16)).save(tmp_path / "deep_key.png", transparency=999)
    frames = [Image.new("RGB", (4, 4), colour) for colour in ("red", "blue")]
    frames[0].save(tmp_path / "moving.gif", save_all=True, append_images=frames[1:])
    Image.new("CMYK", (4, 4), (0, 255, 255, 0)).save(tmp_path / "cmyk.tif")
    white, black, red = (255, 255, 255), (0, 0, 0), (255, 0, 0)
    for name, colour in {
        "clear.png": white,
        "half.png": (127, 127, 127),
        "palette.png": black,
        "clear_palette.png": white,
        "key.png": white,
        "grey_key.png": white,
        "deep_key.png": white,
        "moving.gif": red,
        "cmyk.tif": red,
    }.items():
        assert tuple(same_from_path_and_object(tmp_path / name)[0, 0]) == colour, name


def lab_profile() -> bytes:
    return ImageCms.ImageCmsProfile(ImageCms.createProfile("LAB")).tobytes()


def srgb_profile() -> bytes:
    return ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()


def linear_profile() -> bytes:
    """An RGB profile with the primaries and the name of sRGB and a curve of gamma 1, written by hand from sRGB's."""
    data = bytearray(srgb_profile())
    for index in range(int.from_bytes(data[128:132], "big")):
        tag, offset = data[132 + 12 * index : 136 + 12 * index], 136 + 12 * index
        place = int.from_bytes(data[offset : offset + 4], "big")
        if tag[1:] == b"TRC":
            data[place + 8 : place + 12] = bytes(4)  # function type 0: Y = X ** g
            data[place + 12 : place + 16] = (1 << 16).to_bytes(4, "big")
    return bytes(data)


def test_profiles_are_converted_to_srgb_and_broken_ones_ignored(tmp_path: Path) -> None:
    grey = np.full((4, 4, 3), 55, np.uint8)
    for name, profile in {
        "none": b"",
        "srgb": srgb_profile(),
        "linear": linear_profile(),
        "broken": b"junk" * 50,
        "lab": lab_profile(),
    }.items():
        for mode in ("RGB", "RGBA"):
            Image.fromarray(grey).convert(mode).save(tmp_path / f"{mode}.png", icc_profile=profile)
            value = same_from_path_and_object(tmp_path / f"{mode}.png")[0, 0]
            expected = 255 * (1.055 * (55 / 255) ** (1 / 2.4) - 0.055) if name == "linear" else 55
            assert np.abs(value - expected).max() <= (1 if name == "linear" else 0), (name, mode)


def test_huge_images_are_refused_before_they_are_decoded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Image.new("RGB", (100, 100)).save(tmp_path / "big.png")
    monkeypatch.setattr(_images, "MAX_PIXELS", 9999)
    with pytest.raises(ValueError, match=r"^image .*big\.png: expected at most 9999 pixels, got 100 x 100"):
        _images.read_image(tmp_path / "big.png")


def test_a_fault_has_the_same_sentence_every_time() -> None:
    said = []
    for _ in range(2):
        kept = bytearray(1 << 10)  # so that the next object lies elsewhere
        with pytest.raises(ValueError, match="junk: expected a readable image") as caught:
            _images.decode_image(b"junk", "junk")
        said.append(str(caught.value))
        del kept
    assert said[0] == said[1]
    assert " at 0x" not in said[0]


def test_odd_files_are_one_sentence_that_names_them(tmp_path: Path) -> None:
    def text_chunk(path: Path) -> None:
        facts = PngImagePlugin.PngInfo()
        facts.add_text("comment", "x" * (1 << 22), zip=True)
        Image.fromarray(ramp()).save(path, "PNG", pnginfo=facts)

    def truncated(path: Path) -> None:
        Image.fromarray(ramp()).save(path, format="PNG")
        path.write_bytes(path.read_bytes()[:-60])

    makers: dict[str, Callable[[Path], object]] = {
        "text_chunk": text_chunk,
        "truncated": truncated,
        "not_a_number.ppm": lambda path: path.write_bytes(b"P6 x 4 255\n"),
        "postscript.png": lambda path: path.write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EOF\n"),
        "empty": Path.touch,
        "folder": Path.mkdir,
    }
    for name, make in makers.items():
        make(tmp_path / name)
        with pytest.raises(ValueError, match=rf"^image .*{name}: expected "):
            _images.read_image(tmp_path / name)
    os.mkfifo(tmp_path / "fifo")
    for name, kind in {
        "fifo": "a FIFO",
        "missing": "no such file",
        "x" * 300: "File name too long",
        "a\0b": "a name with a null byte",
    }.items():
        with pytest.raises(ValueError, match=f"expected an image file, got {kind}"):
            _images.read_image(tmp_path / name)
    with Image.open(tmp_path / "truncated") as opened, pytest.raises(ValueError, match=r"^image: expected a readable"):
        _images.open_image(opened)


def seeds() -> dict[str, bytes]:
    """Small files of six formats, with EXIF where the format has it."""
    files = {}
    image = Image.fromarray(ramp())
    for form, options in {
        "JPEG": {"exif": exif(6)},
        "PNG": {"exif": exif(6)},
        "TIFF": {"exif": exif(6)},
        "WEBP": {"exif": exif(6), "lossless": True},
        "GIF": {},
        "MPO": {"exif": exif(3), "save_all": True, "append_images": [image]},
    }.items():
        stream = io.BytesIO()
        image.save(stream, form, **options)
        files[form] = stream.getvalue()
    compressed = io.BytesIO()
    image.save(compressed, "TIFF", compression="tiff_lzw", exif=exif(8))
    return files | {"TIFF compressed": compressed.getvalue()}


def read_or_refuse(path: Path) -> Image.Image | None:
    """The image, or None where it is refused as it should be."""
    message = ""
    try:
        return _images.read_image(path)
    except ValueError as error:
        message = str(error)
    assert message.startswith(f"image {path}: expected ")
    assert len(message) < 500
    return None


def same_as_opened(path: Path, image: Image.Image | None) -> None:
    """The PIL object of a file, where Pillow opens it, gives the same pixels or the same kind of error."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            opened = Image.open(path)
        except Exception:  # the caller's own call of Pillow, with its errors of all kinds
            assert image is None
            return
    with opened:
        if image is None:
            with pytest.raises(ValueError, match=r"^image: expected "):
                _images.open_image(opened)
        else:
            assert np.array_equal(pixels(_images.open_image(opened)), pixels(image))


@pytest.mark.parametrize("form", seeds())
def test_mutated_files_give_an_image_or_one_sentence(tmp_path: Path, form: str) -> None:
    """200 files of a format with a few bytes changed, or cut, near their tags or anywhere."""
    rng, path, whole = random.Random(form), tmp_path / "a", seeds()[form]
    outcomes = {"image": 0, "refused": 0}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(200):
            data = bytearray(whole)
            first = rng.choice((0, 0, len(data) - 1)) if rng.random() < 0.5 else rng.randrange(len(data))
            for _ in range(rng.randint(1, 6)):
                place = min(len(data) - 1, abs(first + rng.randint(-120, 120)))
                data[place] = rng.choice((0, 1, 0x7F, 0x80, 0xFF, rng.randrange(256)))
            path.write_bytes(data[: rng.randrange(len(data))] if rng.random() < 0.1 else data)
            image = read_or_refuse(path)
            same_as_opened(path, image)
            outcomes["refused" if image is None else "image"] += 1
            assert image is None or (image.mode == "RGB" and not image.info)
    assert min(outcomes.values()) > 0, outcomes


@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP"])
def test_mutated_tags_never_lose_intact_pixels(tmp_path: Path, form: str) -> None:
    """The EXIF block alone is changed; Pillow decodes the pixels, so they must come, in one of the orientations."""
    rng, path, tags, lost = random.Random(1), tmp_path / "a", exif(6), 0
    for _ in range(150):
        data = bytearray(tags)
        for _ in range(rng.randint(1, 4)):
            data[rng.randrange(6, len(data))] = rng.randrange(256)
        Image.fromarray(ramp()).save(path, form, exif=bytes(data), lossless=True)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with Image.open(path) as opened:
                decoded = np.asarray(opened.convert("RGB"))
        found = pixels(_images.read_image(path))
        lost += not any(np.array_equal(np.rot90(found, turns), decoded) for turns in range(4)) and not any(
            np.array_equal(np.rot90(found[:, ::-1], turns), decoded) for turns in range(4)
        )
    assert lost == 0


def test_warnings_of_pillow_are_silent_in_threads_and_filters_come_back(tmp_path: Path) -> None:
    Image.fromarray(ramp()).save(tmp_path / "a.jpg", exif=b"Exif\0\0MM\0*\0\0\0\x08\xff\xff")
    before = list(warnings.filters)
    threads = [
        threading.Thread(target=lambda: [_images.read_image(tmp_path / "a.jpg") for _ in range(50)]) for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert list(warnings.filters) == before


def thin() -> list[Image.Image]:
    return [Image.new("RGB", size, (200, 30, 30)) for size in ((1, 60_000), (60_000, 1), (3, 200_000), (200_000, 2))]


def test_very_thin_images_stay_below_a_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    """No image that Pillow makes on the way is larger than the canvas limit; what would be is one sentence."""
    largest = [0]
    core_new, core_resize = Image.new, Image.Image.resize

    def new(mode: str, size: tuple[int, int], *rest: object) -> Image.Image:
        largest[0] = max(largest[0], size[0] * size[1])
        assert largest[0] <= _images.MAX_CANVAS
        return core_new(mode, size, *rest)  # type: ignore[arg-type]

    def resize(image: Image.Image, size: tuple[int, int], *rest: object, **options: object) -> Image.Image:
        largest[0] = max(largest[0], size[0] * size[1])
        assert largest[0] <= _images.MAX_CANVAS
        return core_resize(image, size, *rest, **options)  # type: ignore[arg-type]

    images = thin()
    monkeypatch.setattr(Image, "new", new)
    monkeypatch.setattr(Image.Image, "resize", resize)
    rng = random.Random(0)
    for image in images:
        for how in ("crop", "pad", "resize"):
            assert _images.fit_image(image, 256, 256, how).size == (256, 256)
            assert min(_images.fit_multiple(image, 1, how).size) >= 1
        assert center_crop(image, 256).size == (256, 256)
        assert random_crop(image, 256, rng).size == (256, 256)
        assert random_patch(image, (256, 256), rng, (0.5, 1.5)).size == (256, 256)
        assert random_cut(image, (256, 512), rng).size == (512, 256)
        assert _images.cover_and_cut(image, 384, 512).size == (512, 384)
        assert _images.contain_and_pad(image, 384, 512).size == (512, 384)
        for how in ("pad", "resize"):
            with pytest.raises(ValueError, match="image: expected a shape that needs at most"):
                _images.fit_multiple(image, 4096, how)
    assert largest[0] > 0


def test_the_thin_road_is_the_plain_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a small limit on the canvas ordinary images go the other way, and come out the same but for rounding."""
    images = [Image.fromarray(ramp(*size)) for size in ((24, 90), (90, 24), (40, 41))]

    def made() -> list[np.ndarray]:
        out = []
        for image in images:
            out.append(_images.fit_image(image, 32, 32, "pad"))
            out.append(center_crop(image, 64))
            out.append(_images.cover_and_cut(image, 100, 64))
            out.append(random_cut(image, (64, 64), random.Random(5)))
        return [np.asarray(image).astype(int) for image in out]

    plain = made()
    monkeypatch.setattr(_images, "_fits_canvas", lambda image, height, width: height * width <= 3000)
    monkeypatch.setattr(_images, "_check_canvas", lambda *_: None)
    for a, b in zip(plain, made(), strict=True):
        assert np.abs(a - b).max() <= 2


def test_a_file_too_thin_for_its_bucket_is_skipped_and_named(tmp_path: Path) -> None:
    Image.new("L", (2, 30_000)).save(tmp_path / "thin.png")
    Image.new("L", (64, 64)).save(tmp_path / "good.png")
    data = AnySize(stored(sorted(tmp_path.iterdir())), BucketConfig(max_pixels=64**2, step=16))
    assert [data.name(index) for index in range(len(data))] == ["good.png"]
    assert "thin.png: expected a shape that fits" in data.skipped[0]


def test_captions_that_are_no_utf_8_are_named_and_the_image_is_used(tmp_path: Path) -> None:
    Image.new("RGB", (64, 64)).save(tmp_path / "a.png")
    (tmp_path / "a.txt").write_bytes("café".encode("latin-1"))
    data = AnySize(stored([tmp_path / "a.png"]), BucketConfig())
    sample = data[Draw(0, (64, 64), 0)]
    assert sample["caption"] == ""
    assert "a.txt: expected UTF-8, got byte 0xe9 at 3" in sample["skipped"][0]


def test_memory_of_reading_is_that_of_one_image(tmp_path: Path) -> None:
    Image.fromarray(ramp(256, 256)).save(tmp_path / "a.png")
    tracemalloc.start()
    for _ in range(20):
        _images.image_to_tensor(_images.read_image(tmp_path / "a.png"))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 4 << 20
