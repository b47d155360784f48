"""Next-scale prediction against TokenFlow's original: features, sequence, mask, losses, filters and greedy images."""

from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.cases import Case, case
from tests.models.ids import assert_same_ids
from tests.weights_by_rule import tokenflow_weights
from tokenizers_mm.checkpoints import tokenflow as published
from tokenizers_mm.llm.next_scale import (
    NextScaleGenerator,
    NextScaleInputs,
    ScaleSampling,
    additive_mask,
    block_mask,
    filter_logits,
    guided,
    image_labels,
    next_scale_features,
    next_scale_loss,
    scale_bounds,
    scale_weights,
)
from tokenizers_mm.llm.transformers_api import rope
from tokenizers_mm.models import TokenFlow

transformers = pytest.importorskip("transformers", reason="language models need transformers")
GRIDS = tuple((s, s) for s in (1, 2, 4, 6, 8, 10, 12, 14, 16))
LENGTH = 817


@pytest.fixture(scope="module")
def tokenizer() -> TokenFlow:
    reference = case("tokenflow/clipb_256_enhanced")
    return published.convert(tokenflow_weights(reference), reference.name, reference.config)


def vectors_of(tokenizer: TokenFlow, ids: Tensor) -> Tensor:
    return tokenizer.quantizer.quantizer.look_up(ids)


@torch.no_grad()
def test_features_are_carried_from_scale_to_scale(tokenizer: TokenFlow) -> None:
    reference = case("tokenflow/t2i_tower")
    inputs, outputs = reference.inputs, reference.outputs
    vectors = vectors_of(tokenizer, inputs["indices"])
    features = next_scale_features(vectors, GRIDS)
    torch.testing.assert_close(features, outputs["lm_features"], atol=2e-5, rtol=1e-4)
    bounds = scale_bounds(GRIDS)
    for scale in (1, 4, 8):  # the input of a scale depends on the scales before it alone
        start, end = bounds[scale]
        part = next_scale_features(vectors[:, :start], GRIDS)
        torch.testing.assert_close(part[:, start - 1 : end - 1], features[:, start - 1 : end - 1])
    with pytest.raises(ValueError, match="vectors: expected a whole number of scales"):
        next_scale_features(vectors[:, :7], GRIDS)


@torch.no_grad()
def test_image_and_codes_of_the_tower(tokenizer: TokenFlow) -> None:
    reference = case("tokenflow/t2i_tower")
    inputs, outputs = reference.inputs, reference.outputs
    assert_same_ids(tokenizer, tokenizer.encode_features(inputs["image"]), outputs["codes_from_image"])
    image = tokenizer.decode_ids(inputs["indices"][:1])
    torch.testing.assert_close(image, outputs["image_decode_code"], atol=5e-4, rtol=0)
    assert torch.equal(outputs["image"], outputs["image_decode_code"])


@pytest.mark.parametrize(("top_k", "top_p"), [(0, 0.0), (0, 0.6), (10, 0.0), (12, 0.8), (1, 0.0)])
def test_filters(top_k: int, top_p: float) -> None:
    reference = case("tokenflow/t2i_tower")
    masked = filter_logits(reference.inputs["logits"], top_k, top_p)
    assert torch.equal(masked, reference.outputs[f"sampling.k{top_k}_p{top_p}.masked_logits"])
    if top_k == 1:
        assert torch.equal(masked.argmax(-1), reference.outputs["sampling.k1_p0.0.ids"])


def language_model(reference: Case) -> tuple[Any, NextScaleInputs]:
    """The original's small Llama: norms behind attention and MLP, normed queries and keys. transformers: Exaone 4."""
    sizes, state = reference.config["lm"], reference.tensors("state_dict")
    config = transformers.Exaone4Config(
        vocab_size=sizes["vocab_size"],
        hidden_size=sizes["hidden_size"],
        intermediate_size=sizes["intermediate_size"],
        num_hidden_layers=sizes["layers"],
        num_attention_heads=sizes["heads"],
        num_key_value_heads=sizes["kv_heads"],
        head_dim=sizes["hidden_size"] // sizes["heads"],
        rms_norm_eps=sizes["rms_norm_eps"],
        **rope(sizes["rope_theta"]),
        sliding_window=None,
        layer_types=["full_attention"] * sizes["layers"],
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=sizes["pad_id"],
        tie_word_embeddings=False,
    )
    model = transformers.Exaone4ForCausalLM(config).eval()
    rules = {
        "post_attention_layernorm": "post_feedforward_layernorm",
        "input_layernorm": "post_attention_layernorm",
        "qknorm.query_norm": "q_norm",
        "qknorm.key_norm": "k_norm",
    }
    renamed = {}
    for name, tensor in state.items():
        old = next((part for part in rules if part in name), None)
        renamed[name.replace(old, rules[old]) if old else name] = tensor
    names = {"mm_projector": "project", "lvl_embed": "levels", "pos_1LC": "positions"}
    extra = {n: t for n, t in renamed.items() if n.removeprefix("model.").split(".")[0] in names}
    model.load_state_dict({n: t for n, t in renamed.items() if n not in extra})
    for layer in model.model.layers:
        layer.self_attn.q_norm.variance_epsilon = layer.self_attn.k_norm.variance_epsilon = sizes["qk_norm_eps"]
    inputs = NextScaleInputs(GRIDS, 40, sizes["hidden_size"])
    inputs.load_state_dict(
        {".".join([names[(p := n.removeprefix("model.").split("."))[0]], *p[1:]]): t for n, t in extra.items()}
    )
    return model, inputs


@torch.no_grad()
def test_training_sequence(tokenizer: TokenFlow) -> None:
    reference = case("tokenflow/t2i_lm")
    config, given, outputs = reference.config, reference.inputs, reference.outputs
    model, inputs = language_model(reference)
    ids, prefix = given["input_ids"], config["prefix_len"]
    features = next_scale_features(vectors_of(tokenizer, given["codes"]), GRIDS)
    embeds = inputs(model.get_input_embeddings()(ids), features, prefix)
    thin = embeds.shape[-1] // outputs["inputs_embeds"].shape[-1]  # every n-th channel is stored
    torch.testing.assert_close(embeds[..., ::thin], outputs["inputs_embeds"], atol=2e-5, rtol=1e-4)

    allowed = block_mask(ids != config["lm"]["pad_id"], prefix, GRIDS)
    packed = outputs["attention_allowed_packed_uint8"].numpy()
    expected = np.unpackbits(packed, axis=-1, count=ids.shape[1]).astype(bool)
    assert torch.equal(allowed, torch.from_numpy(expected))
    assert float(additive_mask(allowed, torch.float32).min()) == float(outputs["attention_min_value"])

    labels = image_labels(ids, prefix)
    assert torch.equal(labels, outputs["labels"])
    positions = torch.arange(ids.shape[1]).expand_as(ids)
    assert torch.equal(positions, outputs["position_ids"])
    mask = additive_mask(allowed, torch.float32)
    logits = model(inputs_embeds=embeds, attention_mask=mask, position_ids=positions).logits

    def loss(of: Tensor) -> Tensor:
        return F.cross_entropy(logits[:, :-1].flatten(0, 1), of[:, 1:].flatten())

    torch.testing.assert_close(loss(labels), outputs["loss_vision"], atol=2e-5, rtol=1e-4)
    torch.testing.assert_close(loss(outputs["text_labels"]), outputs["loss_text"], atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("loops", [1, 2])
def test_greedy_generation_with_a_cache_is_the_original_without(loops: int, tokenizer: TokenFlow) -> None:
    reference = case("tokenflow/t2i_lm")
    config, given, outputs = reference.config, reference.inputs, reference.outputs
    model, inputs = language_model(reference)
    sizes = config["lm"]
    generate = NextScaleGenerator(
        model,
        inputs,
        lambda ids: vectors_of(tokenizer, ids),
        sizes["image_token_start"],
        tokenizer.config.quantizer.codebook_size,
    )
    prompt, negative = (
        (ids[None], ids[None] != sizes["pad_id"]) for ids in (given["prefix_cond"], given["prefix_uncond"])
    )
    ids = generate(prompt, negative, ScaleSampling(((1, 0.0),) * loops, config["cfg"]))
    assert torch.equal(ids, outputs[f"greedy.loops{loops}.codes"])
    pixels = np.asarray(tokenizer.to_pil(tokenizer.decode_ids(ids))[0]).astype(int)
    expected = outputs[f"greedy.loops{loops}.png"][0].numpy().astype(int)
    thin = len(pixels) // len(expected)
    difference = np.abs(pixels[::thin, ::thin] - expected)
    assert difference.max() <= 1
    assert (difference > 0).mean() < 1e-3  # the original between thread counts


def test_the_steps_of_a_scale_and_the_need_of_a_negative_prompt(tokenizer: TokenFlow) -> None:
    reference = case("tokenflow/t2i_lm")
    model, inputs = language_model(reference)
    generate = NextScaleGenerator(model, inputs, lambda ids: vectors_of(tokenizer, ids), 121, 256)
    ids = reference.inputs["prefix_cond"][None]
    prompt = (ids, ids != 120)
    with pytest.raises(ValueError, match="negative: expected token ids and mask, for guidance"):
        generate(prompt)
    with pytest.raises(ValueError, match=r"sampling.steps: expected at least one"):
        generate(prompt, sampling=ScaleSampling((), 0.0))
    draw = ScaleSampling(((50, 0.9), (5, 0.0)), guidance=0.0)
    first, second = (generate(prompt, None, draw, torch.Generator().manual_seed(5)) for _ in range(2))
    assert torch.equal(first, second)  # the generator decides
    assert first.shape == (1, LENGTH)
    assert 0 <= int(first.min()) <= int(first.max()) < 256


def test_guidance_and_bad_inputs() -> None:
    logits = torch.tensor([[1.0, 2.0], [3.0, 1.0]])
    assert torch.equal(guided(logits, 0.0), logits[:1])
    assert torch.equal(guided(logits, 2.0), torch.tensor([[3 * 1 - 2 * 3.0, 3 * 2 - 2 * 1.0]]))
    with pytest.raises(ValueError, match=r"grids: expected a first grid of \(1, 1\)"):
        NextScaleInputs([(2, 2)], 4, 8)
    inputs = NextScaleInputs([(1, 1), (2, 2)], 4, 8)
    with pytest.raises(ValueError, match=r"features: expected \[B, 4, D\]"):
        inputs(torch.zeros(1, 8, 8), torch.zeros(1, 5, 4), 2)


def test_scale_weights_lie_between_ids_alike_and_scales_alike() -> None:
    torch.testing.assert_close(scale_weights(GRIDS, 0.0), torch.ones(LENGTH))
    alike = [float(scale_weights(GRIDS, 1.0)[a:b].sum()) for a, b in scale_bounds(GRIDS)]
    assert alike == pytest.approx([LENGTH / len(GRIDS)] * len(GRIDS), rel=1e-5)
    weights = scale_weights(GRIDS, 0.5)
    assert float(weights.mean()) == pytest.approx(1.0, abs=1e-6)
    assert float(weights[0] / weights[-1]) == pytest.approx(16.0, rel=1e-5)


def test_residual_features_are_the_codes_of_the_scale_before() -> None:
    generator, grids = torch.Generator().manual_seed(0), [(1, 1), (2, 2), (4, 4)]
    vectors = torch.randn(2, 21, 3, generator=generator)
    features = next_scale_features(vectors, grids, residual=True)
    torch.testing.assert_close(features[:, :4], vectors[:, :1].expand(-1, 4, -1))
    moved = vectors.clone()
    moved[:, 0] += 1.0  # the first scale reaches the second one's input and no other
    changed = (next_scale_features(moved, grids, residual=True) != features).any(-1)[0]
    assert changed.tolist() == [True] * 4 + [False] * 16
    whole = next_scale_features(vectors, grids)
    assert not torch.allclose(whole[:, 4:], features[:, 4:])


@torch.no_grad()
def test_a_reweighted_loss_is_the_weighted_mean_of_its_terms() -> None:
    torch.manual_seed(0)
    grids = [(1, 1), (2, 2)]
    config = transformers.GPT2Config(vocab_size=20, n_positions=16, n_embd=16, n_layer=1, n_head=2)
    model, inputs = transformers.GPT2LMHeadModel(config).eval(), NextScaleInputs(grids, 3, 16)
    prompt = (torch.tensor([[1, 2, 3]]), torch.ones(1, 3, dtype=torch.bool))
    ids, vectors = torch.tensor([[0, 1, 2, 3, 4]]), torch.randn(1, 5, 3)
    plain, first = (float(next_scale_loss(model, inputs, prompt, ids, vectors, 10, p)) for p in (0.0, 30.0))
    half = float(next_scale_loss(model, inputs, prompt, ids, vectors, 10, 1.0))
    rest = (5 * plain - first) / 4  # a large power leaves the first id alone
    assert half == pytest.approx((first + rest) / 2, rel=1e-5)
