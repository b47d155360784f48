"""Codecs at equal bits: the most quality that fits, payloads without containers, and what is refused."""

import pytest
import torch
from PIL import Image

from tokenizers_mm._images import image_to_tensor
from tokenizers_mm.data.photographs import fixed_crops
from tokenizers_mm.eval.codecs import QUALITIES, Codec, payload_bits
from tokenizers_mm.eval.image import psnr


def writable(name: str) -> str:
    if name == "jxl":
        pytest.importorskip("pillow_jxl", reason="the package pillow-jxl-plugin writes JPEG XL")
    Image.init()
    if name.upper() not in Image.SAVE:
        pytest.skip(f"this Pillow does not write {name}")
    return name


@pytest.mark.parametrize("name", ["jpeg", "webp", "avif", "jxl"])
def test_quality_is_the_highest_that_fits(name: str) -> None:
    codec = Codec.parse(writable(name), "0.8bpp")
    x = image_to_tensor(fixed_crops("heldout", 1, 64)[0])
    bits = 0.8 * 64 * 64
    assert codec.targets(x[None], None) == [bits]
    data, used = codec.compress(x, bits)
    assert used <= bits
    low, high = QUALITIES[name]
    if name in ("jpeg", "webp"):  # the others are slow
        sizes = [Codec(name, quality=q).compress(x, None)[1] for q in range(low, high + 1)]
        assert used == max(size for size in sizes if size <= bits)
    else:
        higher = [q for q in range(low, high + 1, 5) if Codec(name, quality=q).compress(x, None)[1] > bits]
        assert higher, "the highest quality does not fit"
    assert float(psnr(codec.decompress(data)[None], x[None])) > 25
    assert payload_bits(data, name) == used <= 8 * len(data)


def test_too_few_bits_give_the_lowest_quality() -> None:
    x = image_to_tensor(fixed_crops("heldout", 1, 64)[0])
    codec = Codec.parse("jpeg", "10b")
    assert codec.compress(x, 10.0) == Codec("jpeg", quality=QUALITIES["jpeg"][0]).compress(x, None)


def test_names_and_refusals() -> None:
    assert Codec.parse("jpeg", "q75").name == "jpeg q75"
    assert Codec.parse("jpeg", "match").match
    assert not Codec.parse("jpeg", "0.25bpp").match
    for option, message in (("q0", "a quality from 1 to 95"), ("fast", "expected jpeg@match"), ("", "jpeg@match")):
        with pytest.raises(ValueError, match=message):
            Codec.parse("jpeg", option)
    with pytest.raises(ValueError, match="jpeg at equal bits: expected bits of a tokenizer"):
        Codec.parse("jpeg", "match").targets(torch.zeros(1, 3, 8, 8), None)
    try:
        import pillow_jxl  # noqa: F401  # pyright: ignore[reportMissingImports]
    except ImportError:
        with pytest.raises(ValueError, match="jxl: expected the package pillow-jxl-plugin to be installed"):
            Codec.parse("jxl", "match")


def test_payload_of_a_jpeg_leaves_out_its_tables() -> None:
    """Two images of one quality differ in the file by what their payloads differ by."""
    crops = [image_to_tensor(crop) for crop in fixed_crops("heldout", 2, 64)]
    files = [Codec("jpeg", quality=50).compress(x, None) for x in crops]
    (first, bits), (second, others) = files
    assert 8 * (len(first) - len(second)) == bits - others
    assert 8 * len(first) - bits > 8 * 500, "tables of a baseline JPEG"
