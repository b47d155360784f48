"""Positions: those of training in generation, through every wrapper, or a sentence."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.llm.fakes import FakeTokenizer, byte_level, dual, multi_scale, one_scale, words
from tests.llm.test_families import tiny_model
from tests.llm.test_grammar import SIZES
from tests.llm.test_training import learned_positions, picture
from tokenizers_mm.llm import (
    GenerationSettings,
    Grammar,
    MultimodalProcessor,
    Sampling,
    Segment,
    VisualVocabulary,
    extend,
    generate,
    next_token_loss,
)
from tokenizers_mm.llm.model import add_lora
from tokenizers_mm.llm.next_scale import NextScaleGenerator, NextScaleInputs, ScaleSampling
from tokenizers_mm.llm.presets import illume_plus, tokenflow_t2i

GREEDY = Sampling(temperature=0)


class Around(nn.Module):
    """A module around a language model that hands everything on."""

    def __init__(self, inside: Any) -> None:
        super().__init__()
        self.inside = inside

    def forward(self, **named: Any) -> Any:
        return self.inside(**named)


class Dropping(Around):
    def forward(self, input_ids: Tensor, attention_mask: Any = None, **named: Any) -> Any:
        named.pop("position_ids", None)
        return self.inside(input_ids=input_ids, attention_mask=attention_mask, **named)


class Narrow(Around):
    def forward(self, input_ids: Tensor, attention_mask: Any = None, past_key_values: Any = None) -> Any:
        return self.inside(input_ids=input_ids, attention_mask=attention_mask)


def prepared(positions: Any, tokenizer: FakeTokenizer | None = None) -> tuple[Any, MultimodalProcessor]:
    """A GPT-2: it has learned positions, so that each of them counts."""
    torch.manual_seed(0)
    text, tokenizer = words(["a b"]), tokenizer or one_scale()
    sizes = None if tokenizer.image_size else SIZES
    vocabulary = VisualVocabulary.for_tokenizer(tokenizer, text, sizes=sizes)
    model = extend(learned_positions(len(text), 400), vocabulary, init="normal")
    torch.nn.init.normal_(model.transformer.wpe.weight, std=1.0)
    return model.eval(), MultimodalProcessor(tokenizer, text, vocabulary, positions=positions)


def lora(model: Any, processor: MultimodalProcessor) -> Any:
    pytest.importorskip("peft")
    return add_lora(model, processor.vocabulary, rank=2).eval()


WRAPPERS: dict[str, Any] = {
    "plain": lambda model, processor: model,
    "lora": lora,
    "compiled": lambda model, processor: torch.compile(model, backend="eager", dynamic=True),
    "around": lambda model, processor: Around(model).eval(),
    "compiled around": lambda model, processor: torch.compile(Around(model).eval(), backend="eager", dynamic=True),
    "around compiled": lambda model, processor: Around(torch.compile(model, backend="eager", dynamic=True)).eval(),
    "around lora": lambda model, processor: Around(lora(model, processor)).eval(),
    "data parallel": lambda model, processor: nn.DataParallel(model).eval(),
}


@pytest.mark.filterwarnings("default:.*fan_in_fan_out.*:UserWarning")  # peft's word on the Conv1D of GPT-2
@pytest.mark.parametrize("positions", ["order", "slots"])
@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_a_row_of_a_padded_batch_is_the_row_alone(wrapper: str, positions: Any) -> None:
    model, processor = prepared(positions)
    model = WRAPPERS[wrapper](model, processor)
    grammar = Grammar(processor.vocabulary, "image", processor.eos)
    rows: list[Any] = [["a"], ["a b a b b a b a a a", processor.opening()], ["b", picture(1), "b a"]]
    settings = GenerationSettings(40, GREEDY)
    together = generate(model, processor(rows, end=False, side="left"), grammar, settings)
    for row, found in zip(rows, together, strict=True):
        alone = generate(model, processor([row], end=False, side="left"), grammar, settings)[0]
        assert torch.equal(found[: len(alone)], alone)


@pytest.mark.parametrize("mode", ["order", "slots"])
@pytest.mark.parametrize("make", [one_scale, multi_scale, dual])
def test_generation_has_the_positions_of_training(make: Any, mode: Any) -> None:
    """The model opens the images itself; what it wrote, as a row of training, has the same positions."""
    model, processor = prepared(mode, make())
    seen: list[Tensor] = []
    model.register_forward_pre_hook(lambda module, a, named: seen.append(named["position_ids"]), with_kwargs=True)
    prompts = processor(
        [["a b a"], ["b", picture(2, 16, 16) if make is not dual else picture(2, 64, 64), "a"]], end=False, side="left"
    )
    opened = 0
    for kind, seed in (("image", 0), ("image", 1), ("free", 2), ("free", 3)):
        seen.clear()
        settings = GenerationSettings(60, Sampling(temperature=1.5))
        grammar = Grammar(processor.vocabulary, kind, processor.eos)  # type: ignore[arg-type]
        ids = generate(model, prompts, grammar, settings, generator=torch.Generator().manual_seed(seed))
        positions = torch.cat(seen, 1)
        for row in range(2):
            kept = prompts.attention_mask[row].bool()
            whole = torch.cat([prompts.input_ids[row][kept], ids[row]])
            parts = processor.decode(
                [whole[: positions[row].numel() - int((~kept).sum())]], images="codes", malformed="skip"
            )[0]
            contents = [part if not isinstance(part, str) else Segment(part) for part in parts]
            again = processor([contents], end=False)
            length = min(again.input_ids.shape[1], len(whole) - 1)
            own = positions[row][~torch.cat([kept.logical_not(), torch.zeros(ids.shape[1] - 1, dtype=torch.bool)])]
            same = (again.input_ids[0, :length] == whole[:length]).long().cumprod(0).sum()
            assert same > kept.sum() or kind == "free"
            assert torch.equal(own[:same], again.position_ids[0, :same])
            opened += int((processor.vocabulary.code(whole[kept.sum() : same])[0] >= 0).any())
    assert opened >= 4


def test_images_that_begin_with_plain_text_are_refused_where_positions_are_slots() -> None:
    text, tokenizer = byte_level(), multi_scale()
    vocabulary = tokenflow_t2i(tokenizer, text)
    processor = MultimodalProcessor(tokenizer, text, vocabulary, positions="slots")
    model = extend(learned_positions(len(text), 200), vocabulary).eval()
    prompts = processor(["a"], end=False, side="left")
    with pytest.raises(ValueError, match="positions: expected 'order' where images begin with plain text"):
        generate(model, prompts, Grammar(vocabulary, "free", processor.eos))
    generate(model, prompts, Grammar(vocabulary, "image", processor.eos))


def test_a_short_header_has_the_slots_of_the_whole_one() -> None:
    text, tokenizer = words(["a"]), dual()
    vocabulary = illume_plus(tokenizer, text, [(64, 64)])
    processor = MultimodalProcessor(tokenizer, text, vocabulary, positions="slots")
    grammar, plan = Grammar(vocabulary, "image", processor.eos), vocabulary.plan(64, 64)
    row = processor([[picture(0, 64, 64)]], end=False)
    state = grammar.read(torch.zeros(1, 0, dtype=torch.int64))
    for header in (plan.header, plan.short):
        now, slots = state, []
        for token in header:
            slots.append(int(grammar.slot(now, torch.tensor([token]))))
            now = grammar.advance(now, torch.tensor([token]))
        assert slots == row.position_ids[0, len(plan.header) - len(header) : len(plan.header)].tolist()


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        (Dropping, "wrappers that hand position_ids on to the language model, got Dropping, which drops them"),
        (Narrow, r"one that takes position_ids \(.*\), got GPT2LMHeadModel in Narrow"),
    ],
)
def test_a_model_that_gets_no_positions_is_refused(kind: Any, message: str) -> None:
    model, processor = prepared("order")
    prompts = processor(["a", "a b"], end=False, side="left")
    with pytest.raises(ValueError, match=message):
        generate(kind(model).eval(), prompts, Grammar(processor.vocabulary))
    inputs = processor(["a", "a b"], side="left").model_inputs()
    with pytest.raises(ValueError, match=message):
        next_token_loss(kind(model), inputs)


def test_prompt_tuning_drops_positions_and_is_refused() -> None:
    peft = pytest.importorskip("peft")
    model, processor = prepared("order")
    tuned = peft.get_peft_model(model, peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2))
    with pytest.raises(ValueError, match=r"one that takes position_ids .* got GPT2LMHeadModel in PeftModelForCausalLM"):
        next_token_loss(tuned, processor(["a", "a b"], side="left").model_inputs())


def test_a_model_without_positions_takes_rows_that_it_counts_itself() -> None:
    """Mamba has none: rows that are not padded on the left, in order, are as it counts them."""
    transformers = pytest.importorskip("transformers")
    text, tokenizer = words(["a b"]), one_scale()
    vocabulary = VisualVocabulary.for_tokenizer(tokenizer, text)
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "state_size": 4}
    model = transformers.MambaForCausalLM(transformers.MambaConfig(vocab_size=len(text), **sizes))
    model = extend(model, vocabulary).eval()
    processor, slots = (MultimodalProcessor(tokenizer, text, vocabulary, positions=p) for p in ("order", "slots"))  # type: ignore[arg-type]
    grammar = Grammar(vocabulary, "image", processor.eos)
    ids = generate(model, processor(["a b", "b a"], end=False, side="left"), grammar, GenerationSettings(30, GREEDY))
    assert all(len(row) == 1 for row in processor.decode(ids, images="codes"))
    next_token_loss(model, processor(["a", "a b"]).model_inputs()).backward()
    for batch in (processor(["a", "a b"], side="left"), slots(["a b"])):
        with pytest.raises(ValueError, match=r"one that takes position_ids .* got MambaForCausalLM"):
            next_token_loss(model, batch.model_inputs())


def test_next_scale_prompts_of_any_padding_draw_the_same() -> None:
    for longest in (None, 20):
        torch.manual_seed(0)
        model = learned_positions(40, 60).eval()
        torch.nn.init.normal_(model.transformer.wpe.weight, std=1.0)
        inputs = NextScaleInputs(((1, 1), (2, 2), (3, 3)), 4, 32, longest)
        table = torch.randn(8, 4)
        draw = NextScaleGenerator(model, inputs, lambda ids, table=table: table[ids], 30, 8)
        sampling = ScaleSampling(((1, 0.0),), guidance=0.0)
        prompt = torch.tensor([[3, 4, 5]])
        alone = draw((prompt, torch.ones_like(prompt).bool()), None, sampling)
        padded = torch.cat([torch.zeros(1, 9, dtype=torch.int64), prompt], 1)
        assert torch.equal(draw((padded, torch.arange(12)[None] >= 9), None, sampling), alone)
    with pytest.raises(ValueError, match="prompt: expected at most 20 tokens, got 21"):
        draw((torch.zeros(1, 21, dtype=torch.int64), torch.ones(1, 21).bool()), None, sampling)


def test_families_hold_their_rows_under_adapters() -> None:
    pytest.importorskip("peft")
    model, text = tiny_model("llama")
    vocabulary = VisualVocabulary.for_tokenizer(one_scale(), text)
    processor = MultimodalProcessor(one_scale(), text, vocabulary)
    adapted = add_lora(extend(model, vocabulary), vocabulary, rank=2).eval()
    grammar, settings = Grammar(vocabulary, "image", processor.eos), GenerationSettings(30, GREEDY)
    rows = ["a", "a b a b a b a b"]
    together = generate(adapted, processor(rows, end=False, side="left"), grammar, settings)
    for row, found in zip(rows, together, strict=True):
        alone = generate(adapted, processor([row], end=False, side="left"), grammar, settings)[0]
        assert torch.equal(found[: len(alone)], alone)
