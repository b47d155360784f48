"""The next-token loss at labelled places alone is the model's own loss, with its gradients."""

from typing import Any

import pytest
import torch
from transformers import CohereConfig, CohereForCausalLM, GPT2Config, GPT2LMHeadModel

from tests.llm.fakes import one_scale, words
from tests.llm.test_families import FAMILIES, tiny_model
from tokenizers_mm.llm import FeatureProjector, MultimodalProcessor, ProjectorConfig, Segment, VisualVocabulary, extend
from tokenizers_mm.llm.batch import IGNORED
from tokenizers_mm.llm.loss import PLAIN, logits_at, next_token_loss, num_predicted
from tokenizers_mm.llm.model import add_lora
from tokenizers_mm.llm.packing import pack_rows
from tokenizers_mm.llm.projector import embed


def picture(seed: int) -> torch.Tensor:
    return torch.rand(3, 16, 16, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def rows() -> list[Any]:
    return [[Segment("a b a", learn=False), picture(0), "b"], [Segment(picture(1), learn=False), "b a"]]


def other_model(name: str) -> tuple[Any, Any]:
    """GPT-2, which has no decoder module of its own, and Cohere, which scales its logits."""
    if name not in ("gpt2", "cohere"):
        return tiny_model(name)
    text = words(["a b"])
    torch.manual_seed(0)
    ids: dict[str, Any] = {"vocab_size": len(text), "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 0}
    if name == "gpt2":
        drops: dict[str, Any] = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
        return GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=1, n_head=2, n_positions=64, **ids, **drops)), text
    sizes: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1}
    return CohereForCausalLM(CohereConfig(num_attention_heads=4, **sizes, **ids)), text


def prepared(name: str) -> tuple[Any, MultimodalProcessor]:
    model, text = other_model(name)
    vocabulary = VisualVocabulary.for_tokenizer(one_scale(), text)
    return extend(model, vocabulary).eval(), MultimodalProcessor(one_scale(), text, vocabulary)


def assert_same(model: Any, inputs: dict[str, torch.Tensor], more: tuple[torch.nn.Parameter, ...] = ()) -> None:
    """Loss and all gradients; the sums are taken in another order, so float32 tolerances."""
    found = []
    for loss in (model(**inputs).loss, next_token_loss(model, inputs)):
        free = [*(p for p in model.parameters() if p.requires_grad), *more]
        found.append((loss.detach(), torch.autograd.grad(loss, free, allow_unused=True, retain_graph=True)))
    (expected, expected_gradients), (actual, gradients) = found
    torch.testing.assert_close(actual, expected, atol=1e-6, rtol=1e-6)
    for gradient, wanted in zip(gradients, expected_gradients, strict=True):
        assert (gradient is None) == (wanted is None)
        if wanted is not None and gradient is not None:
            torch.testing.assert_close(gradient, wanted, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("name", [*FAMILIES, "gpt2", "cohere"])
def test_it_is_the_models_own_loss(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, processor = prepared(name)
    batch = processor(rows())
    assert_same(model, batch.model_inputs())
    assert_same(model, pack_rows(processor.rows(rows()), 64, processor.pad).model_inputs())
    if name in ("gemma2", "cohere"):  # these do something to their logits
        return
    assert model.config.model_type in PLAIN
    sizes: list[int] = []
    head = model.get_output_embeddings()
    head.register_forward_hook(lambda module, given, result: sizes.append(result[..., 0].numel()))
    next_token_loss(model, batch.model_inputs())
    assert sizes == [num_predicted(batch.labels)]


@pytest.mark.parametrize("name", ["llama", "qwen2"])
def test_under_adapters(name: str) -> None:
    pytest.importorskip("peft")
    model, processor = prepared(name)
    adapted = add_lora(model, processor.vocabulary, rank=4)
    for parameter in adapted.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.1)
    assert_same(adapted, processor(rows()).model_inputs())


def test_with_features() -> None:
    model, processor = prepared("llama")
    projector = FeatureProjector(ProjectorConfig(processor.feature_dims(), 32))
    batch = processor([[Segment(picture(0), learn=False, as_features=True), "a b"]])
    assert_same(model, embed(model, batch, projector), tuple(projector.parameters()))


def test_nothing_labelled_is_no_loss() -> None:
    for name in ("llama", "gemma2"):
        model, processor = prepared(name)
        inputs = processor([[Segment("a b", learn=False)]]).model_inputs()
        inputs["labels"] = torch.full_like(inputs["labels"], IGNORED)
        loss = next_token_loss(model, inputs)
        loss.backward()
        assert float(loss.detach()) == 0
        assert num_predicted(inputs["labels"]) == 0


def test_logits_at_some_places() -> None:
    for name in ("qwen3", "gemma2"):
        model, processor = prepared(name)
        inputs = {key: value for key, value in processor(rows()).model_inputs().items() if key != "labels"}
        where = torch.rand(inputs["input_ids"].shape, generator=torch.Generator().manual_seed(0)) < 0.3
        with torch.no_grad():
            torch.testing.assert_close(logits_at(model, inputs, where), model(**inputs).logits[where])
