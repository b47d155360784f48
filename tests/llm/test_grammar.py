"""The state machine: nothing malformed from an untrained model, every layout, and its place in transformers."""

import json
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from tests.llm.fakes import FakeTokenizer, byte_level, dual, multi_scale, one_scale, pieces, words
from tokenizers_mm.llm import (
    GenerationSettings,
    Grammar,
    GrammarProcessor,
    Layout,
    MultimodalProcessor,
    Sampling,
    VisualVocabulary,
    extend,
    generate,
)
from tokenizers_mm.llm.presets import illume_plus, raster, string_tokens, tokenflow_t2i

SIZES = [(64, 64), (64, 128), (128, 64)]


def model_for(vocabulary: VisualVocabulary, rows: int = 0) -> Any:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=vocabulary.size + rows,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
    )
    return LlamaForCausalLM(config).eval()


def everything() -> dict[str, tuple[FakeTokenizer, Any, VisualVocabulary]]:
    """One vocabulary of every kind of layout."""
    text, letters, two, one = words(["a b"]), byte_level(), dual(), one_scale()
    rows = Layout(("pixel", "semantic"), stream_markers=True, row_end=True, scale_end=True, size="after")
    return {
        "default": (one, text, VisualVocabulary.for_tokenizer(one, text)),
        "scales": (multi_scale(), text, VisualVocabulary.for_tokenizer(multi_scale(), text)),
        "streams": (two, text, VisualVocabulary.for_tokenizer(two, text, sizes=SIZES)),
        "other order": (two, text, VisualVocabulary.for_tokenizer(two, text, rows, SIZES)),
        "illume": (two, text, illume_plus(two, text, SIZES)),
        "tokenflow": (multi_scale(), letters, tokenflow_t2i(multi_scale(), letters)),
        "raster": (one, letters, raster(one, letters)),
        "strings": (one, pieces(), string_tokens(one, pieces())),
    }


@pytest.mark.parametrize("name", list(everything()))
def test_whatever_is_drawn_parses(name: str) -> None:
    tokenizer, text, vocabulary = everything()[name]
    processor = MultimodalProcessor(tokenizer, text, vocabulary)
    prompts = processor(["a", "b a b", ""] if processor.prefix else ["a", "b a b", "b"], end=False, side="left")
    model = model_for(vocabulary, rows=5)
    settings = GenerationSettings(40, Sampling(temperature=2.0))
    generator = torch.Generator().manual_seed(0)
    one = Grammar(vocabulary, "image", eos=processor.eos)
    ids = generate(model, prompts, one, settings, generator=generator)
    assert all(len(row) == 1 for row in processor.decode(ids, images="codes"))
    free = generate(model, prompts, Grammar(vocabulary), settings, generator=generator)
    processor.decode(free, images="codes")
    only = generate(model, prompts, Grammar(vocabulary, "text"), settings, generator=generator)
    assert not bool(vocabulary.is_visual(only).any())
    assert all(isinstance(item, str) for row in processor.decode(only) for item in row)


def test_a_thousand_sequences_of_mixed_sizes() -> None:
    """1,000 at temperature 2, eight at a time, from an untrained model: all parse, and all sizes occur."""
    tokenizer, text = dual(step=64), words(["a b"])
    vocabulary = VisualVocabulary.for_tokenizer(tokenizer, text, sizes=SIZES)
    processor, model = MultimodalProcessor(tokenizer, text, vocabulary), model_for(vocabulary)
    prompts = processor(["a", "b", "a b", "a a a"] * 2, end=False, side="left")
    grammar, generator = Grammar(vocabulary, "image", processor.eos), torch.Generator().manual_seed(0)
    settings, sizes = GenerationSettings(8, Sampling(temperature=2.0)), []
    for _ in range(125):
        ids = generate(model, prompts, grammar, settings, generator=generator)
        for row in processor.decode(ids, images="codes"):
            assert len(row) == 1
            sizes.append((row[0].height, row[0].width))
    assert len(sizes) == 1000
    assert set(sizes) == set(SIZES)


def test_in_transformers_generate_with_sampling_and_beams() -> None:
    tokenizer, text = dual(), words(["a b"])
    vocabulary = VisualVocabulary.for_tokenizer(tokenizer, text, sizes=SIZES)
    processor, model = MultimodalProcessor(tokenizer, text, vocabulary), model_for(vocabulary)
    prompts = processor(["a", "a b b"], end=False, side="left")
    for options in ({"do_sample": True, "top_k": 0}, {"num_beams": 3}):
        grammar = GrammarProcessor(Grammar(vocabulary, "image", processor.eos))
        ids = model.generate(
            input_ids=prompts.input_ids,
            attention_mask=prompts.attention_mask,
            logits_processor=[grammar],
            max_new_tokens=60,
            eos_token_id=text.eos_token_id,
            pad_token_id=text.pad_token_id,
            **options,
        )
        rows = processor.decode(ids, images="codes")
        assert [type(item).__name__ for row in rows for item in row] == ["str", "ImageCodes"] * 2


def test_it_goes_on_from_any_place_in_a_prompt() -> None:
    """Cut a row anywhere: what the grammar then allows first holds the token that was there."""
    for tokenizer, text, vocabulary in everything().values():
        processor = MultimodalProcessor(tokenizer, text, vocabulary)
        size = vocabulary.sizes[-1]
        image = torch.zeros(3, size.height, size.width)
        row = processor([["a", image, "b", image]], end=False).input_ids
        grammar, scores = Grammar(vocabulary), torch.zeros(1, vocabulary.size)
        for cut in range(row.shape[1]):
            allowed = grammar.mask(grammar.read(row[:, :cut]) if cut else torch.tensor([0]), scores.clone())
            assert torch.isfinite(allowed[0, row[0, cut]])


def test_exported_machine_is_the_machine() -> None:
    for tokenizer, text, vocabulary in everything().values():
        for mode in ("free", "image", "text"):
            grammar = Grammar(vocabulary, mode, text.eos_token_id)  # type: ignore[arg-type]
            plain = json.loads(json.dumps(grammar.to_dict()))
            number, state = plain["start"], grammar.begin(torch.tensor([0]))
            generator = torch.Generator().manual_seed(0)
            for _ in range(60):
                assert number == int(state)
                told = plain["states"][number]
                allowed = sorted({token for low, high in told["allow"] for token in range(low, high)})
                finite = torch.isfinite(grammar.mask(state, torch.zeros(1, vocabulary.size + 3)))[0]
                assert finite.nonzero()[:, 0].tolist() == allowed
                if not allowed:
                    break
                token = allowed[int(torch.randint(len(allowed), (1,), generator=generator))]
                state = grammar.advance(state, torch.tensor([token]))
                number = told["next"] if "next" in told else told["jump"].get(str(token), told["else"])
        assert tokenizer is not None


def test_malformed_prompts_and_bad_arguments() -> None:
    tokenizer, text = dual(), words(["a b"])
    vocabulary = VisualVocabulary.for_tokenizer(tokenizer, text, sizes=SIZES)
    row = MultimodalProcessor(tokenizer, text, vocabulary)([torch.zeros(3, 64, 64)], end=False).input_ids
    broken = row.clone()
    broken[0, 5] = 0
    with pytest.raises(ValueError, match=r"row 0: token 6 of \d+ of a 64 x 64 image: expected an id from .* got 0"):
        Grammar(vocabulary).read(broken)
    with pytest.raises(ValueError, match="mode: expected 'free', 'text' or 'image', got poem"):
        Grammar(vocabulary, "poem")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="eos: expected the id of the end token"):
        Grammar(vocabulary, "image")
    with pytest.raises(ValueError, match="sizes: expected headers that tell the sizes apart"):
        Grammar(VisualVocabulary.for_tokenizer(tokenizer, text, Layout(("semantic", "pixel")), SIZES))
    with pytest.raises(ValueError, match=r"scores: expected \[B, V\], V at least"):
        Grammar(vocabulary).mask(torch.tensor([0]), torch.zeros(1, 4))
    model = extend(model_for(vocabulary), vocabulary)
    prompts = MultimodalProcessor(tokenizer, text, vocabulary)(["a", "a b"], end=False)
    with pytest.raises(ValueError, match="prompts: expected padding on the left, got padding on the right"):
        generate(model, prompts, Grammar(vocabulary))
    with pytest.raises(ValueError, match="unconditional: expected prompts for guidance, got None"):
        generate(model, prompts, Grammar(vocabulary), GenerationSettings(guidance=2.0))
    with pytest.raises(ValueError, match=r"streams: expected names among \['semantic', 'pixel'\], got \['colour'\]"):
        generate(model, prompts, Grammar(vocabulary), GenerationSettings(streams={"colour": Sampling()}))
    with pytest.raises(ValueError, match="temperature: expected 0 or more, got -1"):
        Sampling(temperature=-1)
