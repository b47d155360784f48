"""Families of language models, tiny and random: grow, train three steps, draw, save, load plainly, same logits."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    Gemma2Config,
    Gemma3TextConfig,
    GPTNeoXConfig,
    LlamaConfig,
    MistralConfig,
    OPTConfig,
    Phi3Config,
    Qwen2Config,
    Qwen3Config,
)

from tests.llm.fakes import byte_level, dual, one_scale, pieces, words
from tokenizers_mm.llm import (
    GenerationSettings,
    Grammar,
    MultimodalProcessor,
    Sampling,
    TrainableRows,
    VisualVocabulary,
    extend,
    generate,
)

SMALL = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 256,
    "attention_dropout": 0.0,
}
GATED = {**SMALL, "intermediate_size": 64, "num_key_value_heads": 2}
FAMILIES: dict[str, tuple[type, dict[str, Any], Any, int]] = {
    # name: configuration class, its sizes, text tokenizer, rows beyond the text (a padded vocabulary)
    "llama": (LlamaConfig, GATED, pieces, 0),
    "llama-tied": (LlamaConfig, {**GATED, "tie_word_embeddings": True}, words, 0),
    "qwen2": (Qwen2Config, {**GATED, "tie_word_embeddings": True}, byte_level, 15),
    "qwen3": (Qwen3Config, {**GATED, "head_dim": 8}, byte_level, 40),
    "mistral": (MistralConfig, {**GATED, "sliding_window": 16}, pieces, 0),
    "gemma2": (Gemma2Config, {**GATED, "head_dim": 8, "sliding_window": 16}, pieces, 0),
    "gemma3": (Gemma3TextConfig, {**GATED, "head_dim": 8, "sliding_window": 16}, pieces, 64),
    "phi3": (Phi3Config, {**GATED, "pad_token_id": 0}, pieces, 53),
    "gpt-neox": (GPTNeoXConfig, {**SMALL, "intermediate_size": 64}, byte_level, 47),
    "opt": (OPTConfig, {**SMALL, "ffn_dim": 64, "word_embed_proj_dim": 32}, byte_level, 0),
}


def tiny_model(name: str) -> tuple[Any, Any]:
    """A random model of a family, and its text tokenizer."""
    config, sizes, make, padding = FAMILIES[name]
    text = make()
    torch.manual_seed(0)
    ids = {"bos_token_id": text.bos_token_id, "eos_token_id": text.eos_token_id, "pad_token_id": text.pad_token_id}
    model = AutoModelForCausalLM.from_config(config(**{**sizes, "vocab_size": len(text) + padding, **ids}))
    return model.float(), text


@pytest.mark.parametrize("name", FAMILIES)
def test_family(name: str, tmp_path: Path) -> None:
    model, text = tiny_model(name)
    tokenizer = one_scale()
    vocabulary = VisualVocabulary.for_tokenizer(tokenizer, text)
    rows = model.get_input_embeddings().weight.shape[0]
    tied = model.get_output_embeddings().weight is model.get_input_embeddings().weight
    text_rows = model.get_input_embeddings().weight[: len(text)].detach().clone()
    model = extend(model, vocabulary)
    assert model.get_input_embeddings().weight.shape[0] == max(rows, vocabulary.size) == model.config.vocab_size
    assert model.get_output_embeddings().weight.shape[0] == max(rows, vocabulary.size)
    assert (model.get_output_embeddings().weight is model.get_input_embeddings().weight) == tied
    assert torch.equal(model.get_input_embeddings().weight[: len(text)], text_rows)

    processor = MultimodalProcessor(tokenizer, text, vocabulary)
    image = torch.linspace(-1, 1, 256).view(1, 16, 16).expand(3, -1, -1)
    batch = processor([["a b", image], [image, "a b a b"]])
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    model.train()
    losses = []
    for _ in range(3):
        loss = model(**batch.model_inputs()).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[2] < losses[0]

    model.eval()
    grammar = Grammar(vocabulary, "image", text.eos_token_id)
    settings = GenerationSettings(64, Sampling(temperature=2.0))
    prompts = processor(["a", "b a b"], end=False, side="left")
    ids = generate(model, prompts, grammar, settings, generator=torch.Generator().manual_seed(0))
    for row in processor.decode(ids, images="codes"):
        assert [type(item).__name__ for item in row] == ["ImageCodes"]

    model.save_pretrained(tmp_path)
    processor.save(tmp_path)
    again, plain = AutoModelForCausalLM.from_pretrained(tmp_path).eval(), AutoTokenizer.from_pretrained(tmp_path)
    assert plain("a b a")["input_ids"] == text("a b a")["input_ids"]
    assert VisualVocabulary.load(tmp_path) == replace(vocabulary, tokenizer=tokenizer.fingerprint())
    inputs = {key: value for key, value in batch.model_inputs().items() if key not in ("labels", "position_ids")}
    with torch.no_grad():
        assert torch.equal(again(**inputs).logits, model(**inputs).logits)
    assert extend(again, vocabulary).get_input_embeddings().weight.shape == model.get_input_embeddings().weight.shape


def test_cached_guided_greedy_is_what_a_full_recomputation_gives() -> None:
    """Padding, cache and the unconditional branch change nothing: each row again, alone, without a cache."""
    from tokenizers_mm.functional.sampling import guide_logits

    model, text = tiny_model("llama")
    tokenizer = dual()
    vocabulary = VisualVocabulary.for_tokenizer(tokenizer, text, sizes=[(64, 64), (64, 128)])
    extend(model, vocabulary, generator=torch.Generator().manual_seed(1)).eval()
    processor = MultimodalProcessor(tokenizer, text, vocabulary)
    grammar = Grammar(vocabulary, "image", text.eos_token_id)
    size = processor.opening(64, 64)
    conditional = [["a b a b", size], ["b", size], ["abba"]]
    unconditional = [["b", size], ["b", size], ["b"]]
    prompts, empty = (processor(rows, end=False, side="left") for rows in (conditional, unconditional))
    settings = GenerationSettings(200, Sampling(temperature=0), guidance=3.0)
    ids = generate(model, prompts, grammar, settings, unconditional=empty)
    for row in range(3):
        have = [processor([rows[row]], end=False).input_ids for rows in (conditional, unconditional)]
        state = grammar.read(have[0])
        for token in ids[row]:
            with torch.no_grad():
                logits = [model(tokens).logits[:, -1] for tokens in have]
            best = grammar.mask(state, guide_logits(*logits, 3.0)).argmax(-1)
            assert int(best) == int(token)
            if int(token) == text.eos_token_id:
                break
            state, have = grammar.advance(state, best), [torch.cat([tokens, best[:, None]], 1) for tokens in have]


def test_only_new_rows_learn() -> None:
    for name in ("llama", "llama-tied", "qwen3"):
        model, text = tiny_model(name)
        vocabulary = VisualVocabulary.for_tokenizer(one_scale(), text)
        extend(model, vocabulary)
        before = {key: value.clone() for key, value in model.state_dict().items()}
        only = TrainableRows(model, vocabulary)
        batch = MultimodalProcessor(one_scale(), text, vocabulary)([["a", torch.zeros(3, 16, 16)]])
        optimizer = torch.optim.AdamW(only.parameters(), lr=1e-2, weight_decay=0.0)
        for _ in range(2):
            model(**batch.model_inputs()).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        first, last = vocabulary.text_size, vocabulary.size
        for key, value in model.state_dict().items():
            if "embed_tokens" not in key and "lm_head" not in key:
                assert torch.equal(value, before[key]), key
                continue
            assert torch.equal(value[:first], before[key][:first]), key
            assert torch.equal(value[last:], before[key][last:]), key
            assert not torch.equal(value[first:last], before[key][first:last]), key
        only.remove()
        model(**batch.model_inputs()).loss.backward()
        assert all(p.requires_grad for p in model.parameters())
        assert float(model.get_input_embeddings().weight.grad[:first].abs().sum()) > 0


def test_rows_from_a_codebook_keep_its_geometry() -> None:
    """Near codes get near rows, with the mean and spread of the text rows (3 standard errors of 32 x 8 values)."""
    model, text = tiny_model("llama")
    vocabulary = VisualVocabulary.for_tokenizer(one_scale(), text)
    codebook = torch.randn(8, 4, generator=torch.Generator().manual_seed(0))
    codebook[1] = codebook[0] + 1e-3
    extend(model, vocabulary, codebooks={"pixel": codebook}, generator=torch.Generator().manual_seed(0))
    table, start = model.get_input_embeddings().weight.detach(), vocabulary.codes[0].start
    rows, text_rows = table[start : start + 8], table[: vocabulary.text_size]
    distances = torch.cdist(rows, rows) + torch.eye(8) * 1e9
    assert int(distances[0].argmin()) == 1
    assert float(distances[0, 1]) < 0.05 * float(distances[0, 2:].mean())
    assert abs(float(rows.std() / text_rows.std()) - 1) < 3 / (2 * 256) ** 0.5


def test_errors_of_extend() -> None:
    model, text = tiny_model("llama")
    vocabulary = VisualVocabulary.for_tokenizer(one_scale(), text)
    prompts, grammar = MultimodalProcessor(one_scale(), text, vocabulary)(["a"], end=False), Grammar(vocabulary)
    with pytest.raises(ValueError, match=r"model: expected at least 297 rows \(call extend\), got 287"):
        generate(model, prompts, grammar)
    with pytest.raises(ValueError, match=r"model: expected evaluation mode \(model.eval\(\)\), got training mode"):
        generate(extend(tiny_model("llama")[0], vocabulary).train(), prompts, grammar)
    with pytest.raises(ValueError, match=r"codebooks\['pixel'\]: expected \[8, D\], got float32 \[7, 4\]"):
        extend(tiny_model("llama")[0], vocabulary, codebooks={"pixel": torch.zeros(7, 4)})
    with pytest.raises(ValueError, match=r"codebooks: expected streams \['pixel'\], got \['other'\]"):
        extend(tiny_model("llama")[0], vocabulary, codebooks={"other": torch.zeros(8, 4)})
    extend(model, vocabulary)
    with pytest.raises(ValueError, match="model: expected one without visual rows"):
        extend(model, VisualVocabulary.for_tokenizer(one_scale(codebook=16), text))
