"""Generation: pictures that grow, sampling by stream, guidance, interleaved answers."""

from typing import Any

import torch

from tests.llm.fakes import FakeTokenizer, byte_level, dual, multi_scale, one_scale
from tests.llm.test_grammar import SIZES, model_for
from tokenizers_mm.llm import (
    GenerationSettings,
    Grammar,
    MultimodalProcessor,
    Sampling,
    VisualVocabulary,
    generate,
)
from tokenizers_mm.llm.generate import PartialImage, preview


def prepared(tokenizer: FakeTokenizer) -> tuple[Any, MultimodalProcessor, Grammar]:
    text = byte_level()
    sizes = None if tokenizer.image_size else SIZES
    vocabulary = VisualVocabulary.for_tokenizer(tokenizer, text, sizes=sizes)
    processor = MultimodalProcessor(tokenizer, text, vocabulary)
    return model_for(vocabulary), processor, Grammar(vocabulary, "image", processor.eos)


def test_a_callback_sees_rows_and_scales_arrive() -> None:
    for tokenizer, wanted in [
        (multi_scale(), ["scale", "row", "scale", "row", "row", "row", "image"]),
        (one_scale(), ["row", "row", "row", "image"]),
        (dual(), ["row", "scale", *["row"] * 3, "image"]),
    ]:
        model, processor, grammar = prepared(tokenizer)
        seen: list[PartialImage] = []
        size = processor.vocabulary.sizes[0]
        row = ["a", processor.opening(size.height, size.width)]
        prompts = processor([row, ["b b", *row]], end=False, side="left")
        ids = generate(model, prompts, grammar, generator=torch.Generator().manual_seed(0), on_image=seen.append)
        whole = processor.decode(torch.cat([prompts.input_ids, ids], 1), images="codes")
        for index in (0, 1):
            mine = [partial for partial in seen if partial.row == index]
            assert [partial.event for partial in mine] == wanted
            final = whole[index][-1].ids[0]
            for partial in mine:
                assert torch.equal(partial.codes.ids[0][partial.known], final[partial.known])
                assert preview(tokenizer, partial).shape == (1, 3, size.height, size.width)
            assert bool(mine[-1].known.all())
            assert torch.equal(preview(tokenizer, mine[-1]), tokenizer.decode(whole[index][-1]))


def test_a_preview_fills_what_is_missing() -> None:
    tokenizer = one_scale()
    streams = tokenizer.streams(16, 16)
    known = torch.arange(16) < 6
    ids = torch.where(known, torch.arange(16) % 8, 0)
    from tokenizers_mm.types import ImageCodes

    shown = preview(tokenizer, PartialImage(0, "row", ImageCodes(ids[None], 16, 16, streams), known))
    filled = ImageCodes(torch.where(known, ids, 5)[None], 16, 16, streams)
    assert torch.equal(shown, tokenizer.decode(filled))


def test_sampling_differs_by_stream() -> None:
    """The second stream is greedy: with the first one given, two draws agree on it and a free one does not."""
    model, processor, grammar = prepared(dual())
    prompts = processor([["a", processor.opening(128, 64)]] * 6, end=False, side="left")

    def drawn(streams: dict[str, Sampling]) -> list[Any]:
        settings = GenerationSettings(streams=streams)
        ids = generate(model, prompts, grammar, settings, generator=torch.Generator().manual_seed(3))
        rows = processor.decode(torch.cat([prompts.input_ids, ids], 1), images="codes")
        return [row[-1] for row in rows]

    first = drawn({"semantic": Sampling(temperature=0)})
    assert len({tuple(codes.stream("semantic")[0].tolist()) for codes in first}) == 1
    assert len({tuple(codes.stream("pixel")[0].tolist()) for codes in first}) == 6
    few = drawn({"pixel": Sampling(top_k=1), "semantic": Sampling(temperature=0)})
    assert len({tuple(codes.ids[0].tolist()) for codes in few}) == 1


def test_guidance_of_one_is_no_guidance_and_seeds_repeat() -> None:
    model, processor, grammar = prepared(one_scale())
    prompts, empty = (processor([[text]] * 2, end=False, side="left") for text in ("abc", "b"))

    def drawn(scale: float, unconditional: Any = None) -> torch.Tensor:
        settings = GenerationSettings(guidance=scale)
        generator = torch.Generator().manual_seed(0)
        return generate(model, prompts, grammar, settings, unconditional=unconditional, generator=generator)

    plain = drawn(1.0)
    assert torch.equal(plain, drawn(1.0))
    assert torch.equal(plain, drawn(1.0, empty))
    assert not torch.equal(plain, drawn(8.0, empty))
    assert torch.equal(plain, drawn(8.0, prompts))  # two equal branches: their difference is nothing


def test_the_limit_stops_text_and_lets_an_image_end() -> None:
    model, processor, _ = prepared(one_scale())
    prompts = processor([["a"], ["b", processor.opening()]], end=False, side="left")
    grammar = Grammar(processor.vocabulary)
    ids = generate(model, prompts, grammar, GenerationSettings(3), generator=torch.Generator().manual_seed(0))
    assert ids.shape[1] == 17
    rows = processor.decode(torch.cat([prompts.input_ids, ids], 1), images="codes")
    assert [type(item).__name__ for item in rows[1]] == ["str", "ImageCodes"]


def test_progress_is_shown(capsys: Any) -> None:
    model, processor, grammar = prepared(one_scale())
    generate(model, processor([["a"]], end=False, side="left"), grammar, GenerationSettings(20, progress=True))
    assert "token" in capsys.readouterr().err
