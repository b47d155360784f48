"""Ids: a bijection both ways, ranges apart, saved and read back, exact strings, one sentence for what is wrong."""

import json
from pathlib import Path

import pytest
import torch

from tests.llm.fakes import FakeTokenizer, byte_level, dual, multi_scale, one_scale, pieces, words
from tokenizers_mm.llm import Layout, MultimodalProcessor, VisualVocabulary
from tokenizers_mm.llm.presets import illume_plus, raster, string_tokens, tokenflow_t2i
from tokenizers_mm.llm.vocabulary import CodeRange, ImageSize, Marker
from tokenizers_mm.types import ImageCodes

SIZES = [(64, 64), (64, 128), (128, 64)]
CLOSED = Layout(("pixel", "semantic"), stream_markers=True, row_end=True, scale_end=True, size="after")


def vocabularies() -> list[tuple[FakeTokenizer, VisualVocabulary]]:
    text, two = words(["a"]), dual()
    return [
        (one_scale(), VisualVocabulary.for_tokenizer(one_scale(), text)),
        (multi_scale(), VisualVocabulary.for_tokenizer(multi_scale(), text)),
        (two, VisualVocabulary.for_tokenizer(two, text, sizes=SIZES)),
        (two, VisualVocabulary.for_tokenizer(two, text, CLOSED, SIZES)),
        (two, illume_plus(two, text, SIZES)),
        (multi_scale(), tokenflow_t2i(multi_scale(), byte_level())),
        (one_scale(), string_tokens(one_scale(), pieces())),
    ]


def random_codes(vocabulary: VisualVocabulary, height: int, width: int) -> ImageCodes:
    generator = torch.Generator().manual_seed(height)
    streams = vocabulary.streams(height, width)
    parts = [torch.randint(s.codebook_size, (3, s.num_ids), generator=generator) for s in streams]
    return ImageCodes(torch.cat(parts, 1), height, width, streams)


def test_images_to_tokens_and_back() -> None:
    for tokenizer, vocabulary in vocabularies():
        for size in vocabulary.sizes:
            codes = random_codes(vocabulary, size.height, size.width)
            assert codes.streams == tokenizer.streams(size.height, size.width)
            tokens = vocabulary.to_tokens(codes)
            assert tokens.shape == (3, vocabulary.plan(size.height, size.width).length)
            assert torch.equal(vocabulary.to_codes(tokens, size.height, size.width).ids, codes.ids)


def test_each_id_is_one_thing() -> None:
    for _, vocabulary in vocabularies():
        every = torch.arange(vocabulary.size)
        stream, code = vocabulary.code(every)
        for index, given in enumerate(vocabulary.codes):
            own = every[stream == index]
            assert torch.equal(vocabulary.token(given.stream, code[stream == index]), own)
            assert torch.equal(code[stream == index], torch.arange(given.size))
        assert torch.equal(stream >= 0, code >= 0)
        markers = [m.ids[0] for m in vocabulary.markers if len(m.ids) == 1]
        assert len(set(markers)) == len(markers)
        assert not bool((stream[markers] >= 0).any())
        assert int(vocabulary.is_visual(every).sum()) == len(markers) + sum(c.size for c in vocabulary.codes)
        assert not bool(vocabulary.is_visual(every[: vocabulary.text_size]).any())


def test_positions_name_every_place() -> None:
    vocabulary = VisualVocabulary.for_tokenizer(multi_scale(), words())
    slots = vocabulary.plan(16, 16).places
    places = slots[slots[:, 0] >= 0].tolist()
    assert places == [[0, k, r, c] for k, side in enumerate((1, 2, 4)) for r in range(side) for c in range(side)]
    closed = VisualVocabulary.for_tokenizer(dual(), words(), CLOSED, SIZES).plan(64, 64)
    names = [str(m) for m in closed.places[:, 0].tolist()]
    assert "".join("." if name == "-1" else name for name in names) == "....1111.1111.1111.1111....00.00...."


def test_the_file_is_all_a_server_needs(tmp_path: Path) -> None:
    for _, vocabulary in vocabularies():
        vocabulary.save(tmp_path)
        again = VisualVocabulary.load(tmp_path)
        assert again == vocabulary
        size = again.sizes[-1]
        codes = random_codes(vocabulary, size.height, size.width)
        assert torch.equal(again.to_tokens(codes), vocabulary.to_tokens(codes))


def test_presets() -> None:
    letters, text = byte_level(), pieces()
    plain = raster(one_scale(), letters)
    assert [m.ids for m in plain.markers] == [(257,), (258,)]
    assert plain.codes[0].start == 259
    letters.add_tokens(["<|soi|>", "<|eoi|>"])
    reserved = raster(one_scale(), letters)
    assert [m.ids for m in reserved.markers] == [(257,), (258,)]
    assert reserved.codes[0].start == reserved.text_size == len(letters)
    assert raster(one_scale(), letters, offset=300).codes[0].start == 300
    strings = string_tokens(one_scale(), text)
    assert strings.add_to(text) == 3 + 8
    shown = str(text.decode(strings.to_tokens(random_codes(strings, 16, 16))[0].tolist(), skip_special_tokens=False))
    first = int(random_codes(strings, 16, 16).ids[0, 0])
    assert shown.replace(" ", "").startswith(f"<SOM>44<IMAGE><MM-Token-{first}>")
    assert shown.endswith("<EOM>")
    small = byte_level()
    flow = tokenflow_t2i(multi_scale(), small)
    tokens = flow.to_tokens(random_codes(flow, 16, 16))[0].tolist()
    assert small.decode(tokens[:5]) == "<img>"
    assert small.decode(tokens[-6:]) == "</img>"
    assert flow.codes[0].start == len(small) + 1


def test_strings_get_the_ids_of_the_vocabulary() -> None:
    text = words(["a"])
    known = illume_plus(dual(), text, SIZES)
    assert known.add_to(text) == 7 + 32 + 8 + 16
    for marker in known.markers:
        assert text.convert_tokens_to_ids(marker.text) == marker.ids[0]
    assert text.convert_tokens_to_ids("<|image_level1_15|>") == known.size - 1 == len(text) - 1
    assert MultimodalProcessor(dual(), text, known) is not None
    with pytest.raises(ValueError, match="text_tokenizer: expected 4 tokens, got 67"):
        known.add_to(text)


def test_any_size_lists_what_the_tokenizer_takes() -> None:
    known = VisualVocabulary.for_tokenizer(dual(), words())
    assert len(known.sizes) == 256
    assert known.layout.size == "after"

    def only_wide(height: int, width: int) -> tuple[tuple[int, int], ...]:
        if height > width:
            raise ValueError("images: expected wide ones, got a tall one")
        return ((height // 64, width // 64),)

    wide = VisualVocabulary.for_tokenizer(FakeTokenizer({"pixel": (4, only_wide)}, None, 64), words())
    assert len(wide.sizes) == 136


def test_errors(tmp_path: Path) -> None:
    text = words(["a"])
    known = VisualVocabulary.for_tokenizer(dual(), text, sizes=SIZES)
    codes = random_codes(known, 64, 64)
    tokens = known.to_tokens(codes)
    tokens[1, 6] = 0
    for call, message in [
        (
            lambda: known.to_codes(tokens, 64, 64),
            r"token 7 of 28 of .* 64 x 64 image: expected an id from 14 to 21, got 0",
        ),
        (lambda: known.to_codes(tokens[:, 1:], 64, 64), r"tokens: expected int64 \[B, 28\], got int64 \[3, 27\]"),
        (lambda: known.plan(64, 65), r"image size: expected one of the 3 .* got 64 x 65"),
        (lambda: known.token("pixel", torch.tensor([16])), "ids: expected values from 0 to 15, got others"),
        (lambda: known.token("colour", torch.tensor([1])), "stream: expected one of .* got 'colour'"),
        (lambda: known.marker("poem"), "marker: expected one of .* got 'poem'"),
        (lambda: known.to_tokens(random_codes(vocabularies()[0][1], 16, 16)), "image size: expected one of the 3"),
        (lambda: illume_plus(one_scale(), text), "tokenizer: expected one of two streams"),
        (lambda: illume_plus(dual(), text, [(2048, 64)]), "sizes: expected multiples of 64 up to 1024"),
        (lambda: tokenflow_t2i(dual(), text), "tokenizer: expected one of one stream, got 2"),
        (lambda: VisualVocabulary.for_tokenizer(dual(), text, Layout(("pixel",))), r"layout.streams: expected \['sem"),
        (lambda: VisualVocabulary.load(tmp_path), "directory: expected a directory with visual_vocab.json"),
        (lambda: VisualVocabulary.for_tokenizer(dual(), text, sizes=[(65, 64)]), "multiples of 64, got 65 x 64"),
    ]:
        with pytest.raises(ValueError, match=message):
            call()
    overlap = (Marker("image_start", (5,)), Marker("image_end", (9,)))
    with pytest.raises(ValueError, match=r"ids: expected .* ids of their own, got pixel and image_end overlap"):
        VisualVocabulary(5, (CodeRange("pixel", 4, 6),), overlap, Layout(("pixel",)), (ImageSize(1, 1, (((1, 1),),)),))
    known.save(tmp_path)
    path = tmp_path / "visual_vocab.json"
    data = json.loads(path.read_text())
    for change, message in [
        ({"format": 2}, "expected format 1"),
        ({"colour": 1}, "visual_vocab.json.colour: unknown key"),
    ]:
        path.write_text(json.dumps({**data, **change}))
        with pytest.raises(ValueError, match=message):
            VisualVocabulary.load(tmp_path)
    path.write_text("{")
    with pytest.raises(ValueError, match="expected valid JSON"):
        VisualVocabulary.load(tmp_path)
