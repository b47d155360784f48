"""Describe and draw in one call, what is new after a prompt, a processor read back from its folder."""

from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch.nn import functional as F
from transformers import AutoModelForCausalLM

from tests.llm.fakes import FakeTokenizer, byte_level, dual, one_scale, words
from tests.llm.test_grammar import SIZES, model_for
from tests.llm.test_training import picture
from tokenizers_mm.llm import (
    FeatureProjector,
    GenerationSettings,
    Grammar,
    MultimodalProcessor,
    ProjectorConfig,
    Sampling,
    Segment,
    VisualVocabulary,
    describe,
    draw,
    extend,
    generate,
    next_token_loss,
)
from tokenizers_mm.llm.projector import embed
from tokenizers_mm.llm.transformers_api import forward

LEVELS = {"dark": -0.8, "light": 0.8}


def learned(as_features: bool) -> tuple[Any, MultimodalProcessor, FeatureProjector]:
    """A model that learned two images of one grey each, from caption to image and back."""
    torch.manual_seed(0)
    text, tokenizer = words(["dark light what"]), one_scale()
    vocabulary = VisualVocabulary.for_tokenizer(tokenizer, text)
    processor, model = MultimodalProcessor(tokenizer, text, vocabulary), model_for(vocabulary)
    projector = FeatureProjector(ProjectorConfig(processor.feature_dims(), 16))
    rows = []
    for caption, level in LEVELS.items():
        image = torch.full((3, 16, 16), level)
        shown = Segment(image, learn=False, as_features=as_features)
        rows += [[Segment(caption, learn=False), image], [shown, Segment("what", learn=False), caption]]
    batch, optimizer = processor(rows), torch.optim.Adam([*model.parameters(), *projector.parameters()], 1e-2)
    for _ in range(60):
        next_token_loss(model, embed(model, batch, projector)).backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.eval(), processor, projector


@pytest.mark.parametrize("as_features", [False, True])
def test_it_tells_what_it_sees_and_draws_what_it_is_told(as_features: bool) -> None:
    model, processor, projector = learned(as_features)
    for caption, level in LEVELS.items():
        image = torch.full((3, 16, 16), level)
        assert (
            describe(model, image, "what", processor=processor, projector=projector if as_features else None) == caption
        )
        greedy = GenerationSettings(sampling=Sampling(temperature=0))
        for size in (None, (16, 16)):
            drawn = draw(model, caption, size, processor=processor, settings=greedy)
            assert torch.equal(processor.tokenizer.encode(drawn).ids, processor.tokenizer.encode(image[None]).ids)  # type: ignore[union-attr]


def test_a_model_brings_the_processor_of_its_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, processor, _ = learned(False)
    with pytest.raises(ValueError, match="processor: expected one, or a model of a folder in which one is saved"):
        describe(model, picture(1))
    with pytest.raises(ValueError, match=r"image: expected a Path, a PIL image, .*, got 0\.png"):
        describe(model, "0.png", processor=processor)
    assert repr(processor).startswith("MultimodalProcessor(fake, ")
    assert len(repr(processor)) < 200
    model.save_pretrained(tmp_path / "llm")
    processor.save(tmp_path / "llm")
    loaded: list[Path] = []
    monkeypatch.setattr(
        "tokenizers_mm.llm.processor.load_directory", lambda path: loaded.append(path) or processor.tokenizer
    )
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "llm").eval()
    image = torch.full((3, 16, 16), LEVELS["dark"])
    assert describe(again, image, "what") == "dark"
    assert loaded == [tmp_path / "llm" / "tokenizer"]
    drawn = draw(again, "dark", settings=GenerationSettings(sampling=Sampling(temperature=0)))
    assert torch.equal(processor.tokenizer.encode(drawn).ids, processor.tokenizer.encode(image[None]).ids)  # type: ignore[union-attr]


def test_drawing_with_guidance_of_any_size_repeats_with_its_generator() -> None:
    text, tokenizer = words(["a b"]), dual()
    vocabulary = VisualVocabulary.for_tokenizer(tokenizer, text, sizes=SIZES)
    processor = MultimodalProcessor(tokenizer, text, vocabulary)
    model = model_for(vocabulary)
    settings = GenerationSettings(guidance=2.0)
    first, second = (
        draw(
            model,
            "a b",
            (64, 128),
            processor=processor,
            settings=settings,
            generator=torch.Generator().manual_seed(1),
        )
        for _ in range(2)
    )
    assert isinstance(first, Image.Image)
    assert first.size == (128, 64)
    assert first.tobytes() == second.tobytes()
    assert draw(model, "a", processor=processor).size in {(width, height) for height, width in SIZES}
    assert isinstance(describe(model, draw(model, "b", processor=processor), processor=processor), str)


def test_features_in_a_left_padded_prompt_are_those_of_the_row_alone() -> None:
    model, processor, projector = learned(True)
    rows = [
        [Segment(picture(1), as_features=True), "what"],
        ["dark", Segment(picture(2), as_features=True), "what what"],
    ]
    grammar, settings = Grammar(processor.vocabulary, "text", processor.eos), GenerationSettings(6, Sampling(0))
    together = generate(model, processor(rows, end=False, side="left"), grammar, settings, projector=projector)
    for row, found in zip(rows, together, strict=True):
        batch = processor([row], end=False, side="left")
        alone = generate(model, batch, grammar, settings, projector=projector)[0]
        assert torch.equal(found[: len(alone)], alone)
        with torch.no_grad():
            inputs = {name: part for name, part in embed(model, batch, projector).items() if name != "labels"}
            logits = forward(model, inputs).logits[:, -1]
        state = grammar.read(batch.input_ids)
        assert int(grammar.mask(state, logits).argmax()) == int(alone[0])
    with pytest.raises(ValueError, match="prompts: expected images as ids, or a projector, got images as features"):
        generate(model, processor(rows, end=False, side="left"), grammar)


def test_what_is_new_is_told_from_the_prompt() -> None:
    text, tokenizer = byte_level(), one_scale()
    vocabulary = VisualVocabulary.for_tokenizer(tokenizer, text)
    processor = MultimodalProcessor(tokenizer, text, vocabulary)
    image, other = picture(1), picture(2)
    prompts = processor([["say", image], ["a longer one", image, "b", processor.opening()]], end=False, side="left")
    codes = [vocabulary.to_tokens(tokenizer.encode(x[None]))[0] for x in (image, other)]  # type: ignore[arg-type]
    said = [torch.cat([text_ids(processor, "hello"), codes[1]]), torch.cat([codes[1][1:], text_ids(processor, "end")])]
    rows = processor.decode(said, images="codes", prompts=prompts)
    assert [part if isinstance(part, str) else part.ids.tolist() for part in rows[0]] == [
        "hello",
        tokens(tokenizer, other),
    ]
    assert [part if isinstance(part, str) else part.ids.tolist() for part in rows[1]] == [
        tokens(tokenizer, other),
        "end",
    ]
    padded = torch.stack([F.pad(row, (0, 30 - len(row)), value=processor.eos or 0) for row in said])
    again = processor.decode(padded, images="codes", prompts=prompts)
    assert [len(row) for row in again] == [2, 2]
    with pytest.raises(ValueError, match="prompts: expected 1 rows, got 2"):
        processor.decode(padded[:1], prompts=prompts)


def text_ids(processor: MultimodalProcessor, text: str) -> torch.Tensor:
    return torch.tensor(processor.text_tokenizer(text, add_special_tokens=False)["input_ids"])


def tokens(tokenizer: FakeTokenizer, image: torch.Tensor) -> list[list[int]]:
    return tokenizer.encode(image[None]).ids.tolist()  # type: ignore[union-attr]


def test_a_processor_comes_back_from_its_folder(tmp_path: Path) -> None:
    text, tokenizer = words(["a b"]), dual()
    vocabulary = VisualVocabulary.for_tokenizer(tokenizer, text, sizes=SIZES)
    MultimodalProcessor(tokenizer, text, vocabulary, fit="crop", positions="slots").save(tmp_path)
    again = MultimodalProcessor.from_pretrained(tmp_path, tokenizer)
    row: list[Any] = [["a", Image.new("RGB", (300, 140), (200, 10, 10)), "b"]]
    original = MultimodalProcessor(tokenizer, text, vocabulary, fit="crop", positions="slots")(row)
    assert torch.equal(again(row).input_ids, original.input_ids)
    assert torch.equal(again(row).position_ids, original.position_ids)
    with pytest.raises(ValueError, match="tokenizer"):
        MultimodalProcessor.from_pretrained(tmp_path)
    (tmp_path / "multimodal_processor.json").write_text('{"positions": "sideways"}')
    with pytest.raises(ValueError, match=r"multimodal_processor\.json\.positions: expected"):
        MultimodalProcessor.from_pretrained(tmp_path, tokenizer)
    (tmp_path / "multimodal_processor.json").unlink()
    assert MultimodalProcessor.from_pretrained(tmp_path, tokenizer).longest_image is None
    assert extend(model_for(vocabulary), vocabulary) is not None
