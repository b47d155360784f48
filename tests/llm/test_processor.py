"""Rows of text and images to batches and back: any number and order, odd captions, labels, padding, features."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from PIL import Image
from torch import nn

from tests.llm.fakes import FakeTokenizer, byte_level, dual, multi_scale, one_scale, pieces, words
from tokenizers_mm.llm import Batch, MultimodalProcessor, Segment, VisualVocabulary
from tokenizers_mm.llm.batch import IGNORED
from tokenizers_mm.llm.presets import illume_plus
from tokenizers_mm.llm.projector import FeatureProjector, ProjectorConfig, embed
from tokenizers_mm.types import ImageCodes, ImageLatents

SIZES = [(64, 64), (64, 128), (128, 64)]


def processor_for(tokenizer: FakeTokenizer, text: Any, **options: Any) -> MultimodalProcessor:
    sizes = None if tokenizer.image_size else SIZES
    return MultimodalProcessor(tokenizer, text, VisualVocabulary.for_tokenizer(tokenizer, text, sizes=sizes), **options)


def picture(height: int, width: int, seed: int = 0) -> torch.Tensor:
    return torch.rand(3, height, width, generator=torch.Generator().manual_seed(seed)) * 2 - 1


ROWS: list[list[Any]] = [
    ["a caption with {braces} and {0} %s", picture(64, 64)],
    [picture(64, 128)],
    ["only text"],
    ["", picture(64, 64), "", picture(128, 64, 1), "between", picture(64, 64, 2), "<|image_start|> é 猫"],
    [picture(64, 64), picture(64, 64, 3)],
    [""],
]


@pytest.mark.parametrize("make", [byte_level, pieces])
@pytest.mark.parametrize("side", ["left", "right"])
def test_there_and_back(make: Any, side: Any) -> None:
    processor = processor_for(dual(), make())
    rows = ROWS if processor.prefix else ROWS[:-1]
    batch = processor(rows, side=side)
    assert batch.input_ids.shape == batch.labels.shape == batch.attention_mask.shape == batch.places.shape[:2]
    back = processor.decode(batch.input_ids, images="codes")
    for row, again in zip(rows, back, strict=True):
        wanted = [part for part in row if part != ""] if isinstance(row, list) else row
        assert len(again) == len(wanted)
        for part, copy in zip(wanted, again, strict=True):
            if isinstance(part, str):
                assert copy.strip() == part
            else:
                assert torch.equal(copy.ids, processor.tokenizer.encode(part[None]).ids)  # type: ignore[union-attr]
    shown = processor.decode(batch.input_ids)
    assert [type(item).__name__ for item in shown[3]] == ["Image", "Image", "str", "Image", "str"]
    assert shown[1][0].size == (128, 64)


def test_labels_masks_and_hints() -> None:
    processor = processor_for(one_scale(), pieces())
    image = picture(16, 16)
    batch = processor([[Segment("a b", learn=False), image], ["a"], [image, Segment("a", learn=False)]])
    vocabulary, eos = processor.vocabulary, processor.eos
    ids, labels, mask = batch.input_ids, batch.labels, batch.attention_mask
    assert int(ids[0, 0]) == 1  # the start token, never learned
    assert bool((labels[:, 0] == IGNORED).all())
    tokens = vocabulary.to_tokens(processor.tokenizer.encode(image[None]))[0]  # type: ignore[arg-type]
    assert labels[0][labels[0] != IGNORED].tolist() == [*tokens.tolist(), eos]
    assert mask[1].tolist() == [1, 1, 1] + [0] * (ids.shape[1] - 3)
    assert bool((labels[mask == 0] == IGNORED).all())
    assert int(labels[2][mask[2] == 1][-1]) == IGNORED  # nothing learned after a prompt
    codes = vocabulary.code(ids)[0] >= 0
    assert torch.equal(codes, batch.places[..., 0] >= 0)
    assert batch.places[2][codes[2]].tolist() == [[0, 0, r, c] for r in range(4) for c in range(4)]
    left = processor([["a"], ["a a a", image]], side="left")
    assert bool(left.attention_mask[:, -1].all())
    assert torch.equal(left.input_ids[1][left.attention_mask[1] == 1], processor([["a a a", image]]).input_ids[0])


def test_pictures_paths_and_codes_are_the_same(tmp_path: Path) -> None:
    processor = processor_for(one_scale(), words(["a"]))
    shown = processor.tokenizer.to_pil(picture(16, 16)[None])[0]
    shown.save(tmp_path / "a.png")
    codes = processor.tokenizer.encode(shown)
    rows = processor([[shown], [tmp_path / "a.png"], [codes], [Segment(shown)]]).input_ids
    assert bool((rows == rows[0]).all())


def test_other_sizes_are_fitted_when_asked() -> None:
    wide = Image.new("RGB", (300, 140), (200, 10, 10))
    for fit in ("crop", "pad", "resize"):
        processor = processor_for(dual(), words(), fit=fit)
        assert processor.decode(processor([wide]).input_ids)[0][0].size == (128, 64)
    with pytest.raises(ValueError, match="multiples of 64, got 140 x 300"):
        processor_for(dual(), words())([wide])


def test_parts_of_an_image() -> None:
    processor = processor_for(dual(), words(["a"]))
    row = processor([["a", picture(64, 64), "a"]], end=False).input_ids[0]
    for malformed, count in (("skip", 0), ("repair", 1)):
        for cut in (row[:-4], torch.cat([row[:12], row[13:]])):
            items = processor.decode([cut], images="codes", malformed=malformed)[0]  # type: ignore[arg-type]
            assert sum(isinstance(item, ImageCodes) for item in items) == count
    with pytest.raises(ValueError, match="image at token 1: expected 28 tokens, got 25"):
        processor.decode([row[:-4]])
    with pytest.raises(ValueError, match="token 0: expected text or the start of an image, got image token"):
        processor.decode([row[5:]])
    tags = MultimodalProcessor(dual(), words(), illume_plus(dual(), words(), SIZES))
    sizes = tags.vocabulary.marker("height_64") + tags.vocabulary.marker("width_128")
    assert [run.end for run in tags.parser.parse(torch.tensor(sizes))] == [2]  # sizes may stand in a text


def test_openings() -> None:
    for make in (lambda: one_scale(), lambda: dual()):
        processor = processor_for(make(), words(["a"]))
        size = processor.vocabulary.sizes[-1]
        opened = processor([["a", processor.opening(size.height, size.width)]], end=False).input_ids[0]
        plan = processor.vocabulary.plan(size.height, size.width)
        assert opened.tolist()[-len(plan.header) :] == list(plan.header)
        last = processor([["a", processor.opening()]], end=False).input_ids[0, -1]
        assert (int(last),) == processor.vocabulary.marker("image_start")


class Continuous(FakeTokenizer):
    """No ids: features only."""

    def __init__(self) -> None:
        super().__init__({}, (16, 16), 4)

    def encode_tensor(self, x: torch.Tensor) -> Any:
        return ImageLatents(x[:, 0].flatten(1)[:, :4, None], 16, 16, (2, 2))

    def features(self, images_or_codes: Any) -> torch.Tensor:
        return torch.ones(len(images_or_codes), 6, 5) * torch.arange(6.0)[:, None]


@pytest.mark.parametrize("tokenizer", [Continuous(), multi_scale(), one_scale()])
def test_features_take_the_place_of_ids(tokenizer: FakeTokenizer) -> None:
    text = byte_level()
    processor = processor_for(tokenizer, text)
    image = Segment(picture(16, 16), as_features=True)
    batch = processor([["ab", image, "c"], [image, image], ["only text"]])
    count, channels = (6, 5) if isinstance(tokenizer, Continuous) else (16, 3)
    assert batch.is_feature.sum(1).tolist() == [count, 2 * count, 0]
    assert bool((batch.labels[batch.is_feature] == IGNORED).all())
    torch.manual_seed(0)
    projector = FeatureProjector(ProjectorConfig((channels,), 8, "silu"))
    embedding = nn.Embedding(processor.vocabulary.size, 8)
    model = SimpleNamespace(get_input_embeddings=lambda: embedding)
    inputs = embed(model, batch, projector)
    expected = projector.parts[0](batch.features[0][0])
    for row, starts in ((0, [2]), (1, [0, count])):
        for start in starts:
            found = inputs["inputs_embeds"][row, start : start + count]
            torch.testing.assert_close(found, expected, atol=1e-6, rtol=0)  # float32: another order of sums
    places = ~batch.is_feature
    assert torch.equal(inputs["inputs_embeds"][places], embedding(batch.input_ids)[places])
    inputs["inputs_embeds"].sum().backward()
    assert all(p.grad is not None for p in projector.parameters())
    with pytest.raises(ValueError, match=r"features: expected parts of \(7,\) channels"):
        embed(model, batch, FeatureProjector(ProjectorConfig((7,), 8)))
    with pytest.raises(ValueError, match="batch: expected images as ids"):
        batch.model_inputs()
    only_text = processor(["only text"])
    assert embed(model, only_text, projector)["inputs_embeds"].shape[-1] == 8


def test_batch_moves_as_one() -> None:
    batch = processor_for(one_scale(), byte_level())([["a", Segment(picture(16, 16), as_features=True)]])
    moved = batch.to("meta")
    assert isinstance(moved, Batch)
    assert moved.features[0][0].is_meta
    assert moved.input_ids.is_meta


def test_errors() -> None:
    text = words(["a"])
    processor = processor_for(one_scale(), text)
    codes = processor.tokenizer.encode(picture(16, 16)[None].expand(2, -1, -1, -1))
    spelled = byte_level()
    known = illume_plus(dual(), spelled, SIZES)
    known.add_to(spelled)
    speaking = MultimodalProcessor(dual(), spelled, known)
    assert speaking([["<height_64><width_64>", picture(64, 64)]]).input_ids.shape[0] == 1
    bad: Any = ("up", "jpg", "hope")
    for call, message in [
        (lambda: processor("a"), "rows: expected a list of rows, got one text"),
        (lambda: processor([]), "rows: expected at least one row, got none"),
        (lambda: processor([[3]]), "row: expected texts, images, paths, image codes or Segments, got int"),
        (lambda: processor([[codes]]), "image codes: expected codes of one image, got of 2"),
        (lambda: processor([[torch.zeros(1, 16, 16)]]), r"image: expected float \[3, H, W\]"),
        (lambda: processor([["a " * 20]], max_length=5), "row 0: expected at most 5 tokens, got 21"),
        (lambda: processor([[""]], end=False), "row 0: expected at least one token, got none"),
        (lambda: processor([["a"]], side=bad[0]), "side: expected 'left' or 'right', got up"),
        (lambda: processor.decode(torch.tensor([[0]]), images=bad[1]), "images: expected 'pil' or 'codes', got jpg"),
        (lambda: processor.decode(torch.tensor([[0]]), malformed=bad[2]), "malformed: expected 'refuse', 'skip' or"),
        (lambda: speaking([["a <start_of_image> b"]]), "text: expected no image tokens, got 257 in 'a <start_of_im"),
        (lambda: processor_for(Continuous(), text)([[picture(16, 16)]]), "image: expected a Segment with as_features"),
        (
            lambda: MultimodalProcessor(one_scale(), byte_level(), processor.vocabulary),
            "text_tokenizer: expected the one",
        ),
    ]:
        with pytest.raises(ValueError, match=message):
            call()
