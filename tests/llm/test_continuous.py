"""A language model with MAR in both directions: Harmon's cases, the cache, gradients, prompts."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from tests.cases import Case, case
from tests.llm.fakes import byte_level
from tests.mar_cases import GENERATION, GRADIENT, NETWORK, assert_close, build, gradients, recorded_noise
from tokenizers_mm.functional.masking import masked_counts
from tokenizers_mm.llm import MultimodalProcessor, VisualVocabulary
from tokenizers_mm.llm.continuous import (
    PLACEHOLDER,
    ContinuousLM,
    ImageBatch,
    TextBatch,
    image_requests,
    question_row,
)
from tokenizers_mm.llm.transformers_api import rope
from tokenizers_mm.models.mar import MARDraws, buffers_first
from tokenizers_mm.models.mar_sampling import Plan, SamplingConfig, plan_masked

transformers = pytest.importorskip("transformers")


def language_model(sizes: dict[str, Any]) -> Any:
    known = {key: value for key, value in sizes.items() if key != "arch" and key != "rope_theta"}
    config = transformers.Qwen2Config(**known, **rope(sizes["rope_theta"]), attn_implementation="eager")
    return transformers.Qwen2ForCausalLM(config)


def build_lm(reference: Case) -> tuple[ContinuousLM, list]:
    tokenizer, links = build(reference)
    state = reference.tensors("state_dict")
    llm = language_model(reference.config["llm"])
    llm.load_state_dict({n.removeprefix("llm."): t for n, t in state.items() if n.startswith("llm.")})
    model = ContinuousLM(tokenizer, llm)
    model.load_projectors({n: t for n, t in state.items() if n.startswith(("proj_in.", "proj_out."))})
    return model.eval(), links


def test_understanding() -> None:
    reference = case("mar/harmon_understanding_tinyllm")
    model, _ = build_lm(reference)
    inputs, outputs = reference.inputs, reference.outputs
    latents = model.tokenizer.encode(inputs["pixel_values"])
    assert_close(model.tokenizer.vectors(latents), outputs["latents"], NETWORK, "latents")
    features = model.tokenizer.features(latents)
    assert_close(buffers_first(features, model.tokenizer.num_buffers), outputs["x_enc"], NETWORK, "x_enc")
    assert_close(model.read(latents), outputs["z_enc"], NETWORK, "z_enc")
    ids = inputs["input_ids"].masked_fill(inputs["input_ids"] == reference.config["image_token_id"], PLACEHOLDER)
    prompt = model.prompt(ids, torch.ones_like(ids, dtype=torch.bool), latents)
    assert_close(prompt.embeddings, outputs["inputs_embeds"], NETWORK, "inputs_embeds")
    with torch.no_grad():
        hidden = model.language_model.get_decoder()(inputs_embeds=prompt.embeddings).last_hidden_state
        assert_close(hidden, outputs["last_hidden"], NETWORK, "last_hidden")
        logits = model.language_model(inputs_embeds=prompt.embeddings).logits
    assert_close(logits, outputs["logits"], NETWORK, "logits")
    expected = outputs["greedy_ids"]
    assert torch.equal(model.answer(prompt, max_new_tokens=expected.shape[1]), expected)


GENERATIONS = ["harmon_generation_nocfg", "harmon_generation_cfg3_constant", "harmon_generation_cfg_linear_6x10"]


@pytest.mark.parametrize("cache", [True, False])
@pytest.mark.parametrize("name", GENERATIONS)
def test_generation(name: str, cache: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    reference = case(f"mar/{name}")
    model, _ = build_lm(reference)
    inputs, outputs, config = reference.inputs, reference.outputs, reference.config
    grid = tuple(config["image_shape"])
    sampling = SamplingConfig(
        config["num_iter"], "100", config["cfg"], config["cfg_schedule"], temperature=config["temperature"]
    )
    seen: list[Tensor] = []
    add = ContinuousLM._add_residual
    monkeypatch.setattr(ContinuousLM, "_add_residual", lambda *a: seen.append(add(*a)) or seen[-1])
    prompt = model.prompt(inputs["input_ids"], inputs["attention_mask"])
    batch = len(inputs["orders"]) // (1 if config["cfg"] == 1 else 2)
    plan = Plan(inputs["orders"][:batch], torch.zeros(batch, grid[0] * grid[1], 8))
    noise = recorded_noise(inputs)
    tokens = model.generate(prompt, sampling, grid=grid, plan=plan, noise=noise, cache=cache)
    for step, encoded in enumerate(seen):
        assert_close(encoded, outputs[f"x_enc_step_{step}"], GENERATION, f"x_enc {step}")
    assert len(seen) == config["num_iter"]
    assert_close(tokens.unflatten(1, grid), outputs["latents"][:batch], GENERATION, "latents")
    if "images" in outputs:
        with torch.no_grad():
            images = model.tokenizer.decode(model.tokenizer.latents(tokens, grid))
        assert_close(images, outputs["images"], GENERATION, "images")


def test_training_losses() -> None:
    reference = case("mar/harmon_train_losses")
    inputs, outputs = reference.inputs, reference.outputs
    model, links = build_lm(reference)
    grid = (inputs["latents"].shape[1], inputs["latents"].shape[2])
    latents = model.tokenizer.latents(inputs["latents"].flatten(1, 2), grid)
    ids, mask = inputs["i2t_input_ids"], inputs["i2t_attention_mask"]
    assert reference.config["image_token_id"] == PLACEHOLDER
    loss = model(TextBatch(ids, mask, inputs["i2t_labels"], latents))["text"]
    assert_close(loss, outputs["loss_image2text"], NETWORK, "text")
    loss.backward()
    compare(model, links, outputs, "i2t_grad:", at_least=7)
    model.zero_grad(set_to_none=True)
    draws = MARDraws(inputs["mask"].bool(), inputs["t"], inputs["noise"])
    terms = model(ImageBatch(inputs["t2i_input_ids"], inputs["t2i_attention_mask"], latents, draws))
    loss = terms["noise"] + terms["bound"]
    assert_close(loss, outputs["loss_text2image"], NETWORK, "image")
    loss.backward()
    compare(model, links, outputs, "t2i_grad:", at_least=10)


def compare(model: ContinuousLM, links: list, outputs: dict[str, Tensor], prefix: str, at_least: int) -> None:
    own = gradients(model.tokenizer, links)
    for name, parameter in model.named_parameters():
        if not name.startswith("tokenizer.") and parameter.grad is not None:
            own[name.replace("language_model.", "llm.").replace("projector.parts.0.", "proj_in.")] = parameter.grad
    names = [key.removeprefix(prefix) for key in outputs if key.startswith(prefix)]
    assert len(names) >= at_least
    for name in names:
        assert_close(own[name], outputs[prefix + name], GRADIENT, prefix + name)


@pytest.fixture(scope="module")
def model() -> ContinuousLM:
    return build_lm(case("mar/harmon_train_losses"))[0]


def test_padding_side_and_order_do_not_matter(model: ContinuousLM) -> None:
    """Padded on either side, alone or in a batch, cached or not: one result."""
    ids, grid = torch.tensor([[5, 6, 7, 8, 9]]), (3, 4)
    sampling = SamplingConfig(steps=3, diffusion="8")
    plan = Plan(torch.arange(12).flip(0)[None], torch.zeros(1, 12, 8))

    def run(ids: Tensor, mask: Tensor, cache: bool) -> Tensor:
        generator = torch.Generator().manual_seed(0)
        return model.generate(model.prompt(ids, mask), sampling, generator, grid=grid, plan=plan, cache=cache)

    expected = run(ids, torch.ones_like(ids, dtype=torch.bool), cache=False)
    pad, true = torch.tensor([[1, 2]]), torch.ones(1, 5, dtype=torch.bool)
    false = torch.zeros(1, 2, dtype=torch.bool)
    for cache in (True, False):
        right = run(torch.cat([ids, pad], 1), torch.cat([true, false], 1), cache)
        left = run(torch.cat([pad, ids], 1), torch.cat([false, true], 1), cache)
        assert_close(right, expected, GENERATION, f"right {cache}")
        assert_close(left, expected, GENERATION, f"left {cache}")


def test_generation_is_decided_by_the_generator(model: ContinuousLM) -> None:
    ids, mask = torch.randint(0, 150, (4, 5)), torch.ones(4, 5, dtype=torch.bool)
    prompt = model.prompt(ids, mask)
    sampling = SamplingConfig(steps=4, diffusion="8", guidance=2.0, guidance_schedule="linear")

    def run(seed: int) -> Tensor:
        return model.generate(prompt, sampling, torch.Generator().manual_seed(seed), grid=(4, 4))

    assert torch.equal(run(1), run(1))
    assert not torch.equal(run(1), run(2))
    assert run(1).shape == (2, 16, 8)


def test_in_painting_keeps_what_is_given_and_an_image_may_come_before(model: ContinuousLM) -> None:
    grid, count = (4, 4), 16 + model.tokenizer.num_buffers
    latents = model.tokenizer.latents(torch.randn(1, 16, 8), grid)
    ids = torch.tensor([[3, 4, *[PLACEHOLDER] * count, 5]])
    prompt = model.prompt(ids, torch.ones_like(ids, dtype=torch.bool), latents)
    given, hidden = torch.randn(1, 16, 8), torch.zeros(1, 16, dtype=torch.bool)
    hidden[:, 8:] = True
    sampling = SamplingConfig(steps=2, diffusion="8")

    def run(cache: bool) -> Tensor:
        generator = torch.Generator().manual_seed(0)
        plan = plan_masked(given, hidden, generator)
        return model.generate(prompt, sampling, generator, grid=grid, plan=plan, cache=cache)

    tokens = run(cache=True)
    assert torch.equal(tokens[:, :8], given[:, :8])
    assert not torch.equal(tokens[:, 8:], given[:, 8:])
    assert_close(tokens, run(cache=False), GENERATION)


def test_text_gradients_are_scaled_and_the_latents_are_constants(model: ContinuousLM) -> None:
    latents = model.tokenizer.latents(torch.randn(1, 16, 8), (4, 4))
    count = 16 + model.tokenizer.num_buffers
    ids = torch.tensor([[3, *[PLACEHOLDER] * count, 5]])
    mask = torch.ones_like(ids, dtype=torch.bool)
    weight = list(model.proj_in.parameters())[2]
    found = []
    for scale in (1.0, 0.1):
        prompt = model.prompt(ids, mask, latents, scale)
        found.append(torch.autograd.grad(prompt.embeddings.square().sum(), weight)[0])
    torch.testing.assert_close(found[1], found[0] * 0.1)


def test_errors(model: ContinuousLM) -> None:
    latents = model.tokenizer.latents(torch.randn(1, 16, 8), (4, 4))
    ids = torch.tensor([[3, PLACEHOLDER, 5]])
    mask = torch.ones_like(ids, dtype=torch.bool)
    with pytest.raises(ValueError, match="input_ids: expected 22 places of images in all, got 1"):
        model.prompt(ids, mask, latents)
    with pytest.raises(ValueError, match=r"mask: expected bool \[1, 3\], got bool \[1, 2\]"):
        model.prompt(ids, mask[:, :2])
    prompt = model.prompt(ids[:, :1], mask[:, :1])
    with pytest.raises(ValueError, match="prompt: expected 0 rows"):
        model.generate(prompt, SamplingConfig(steps=2, guidance=2.0))
    with pytest.raises(ValueError, match="projectors: expected the tensors of proj_in"):
        model.load_projectors({"proj_in.0.weight": torch.zeros(1)})
    with pytest.raises(ValueError, match="got other"):
        model.load_projectors({"other.weight": torch.zeros(1)})


def test_rows_are_harmons_and_go_through_the_processor(model: ContinuousLM) -> None:
    """The same embeddings from the processor's rows as from ids with placeholders; both directions from there."""
    text = byte_level()
    vocabulary = VisualVocabulary.for_tokenizer(model.tokenizer, text, sizes=[(8, 8), (16, 16)])
    processor = MultimodalProcessor(model.tokenizer, text, vocabulary)
    llm = language_model({**case("mar/harmon_train_losses").config["llm"], "vocab_size": vocabulary.text_size})
    whole = ContinuousLM(model.tokenizer, llm).eval()

    requests = image_requests(["a red cat", "sun"], guided=True)
    head, tail = "<|im_start|>user\nGenerate an image", "<|im_end|>\n<|im_start|>assistant\n"
    assert requests == [f"{head}: a red cat{tail}", f"{head}: sun{tail}", f"{head}.{tail}", f"{head}.{tail}"]
    prompt = whole.prompt_of(processor(requests, end=False))
    sampling = SamplingConfig(steps=2, diffusion="4", guidance=2.0)
    tokens = whole.generate(prompt, sampling, torch.Generator().manual_seed(0), grid=(3, 3))
    assert tokens.shape == (2, 9, 8)

    image = torch.rand(3, 8, 8) * 2 - 1
    batch = processor([question_row(image, "What is it?")], end=False)
    prompt = whole.prompt_of(batch)
    latents = model.tokenizer.encode(image[None])
    count = latents.values.shape[1] + model.tokenizer.num_buffers
    before, after = ("<|im_start|>user\n", "\nWhat is it?<|im_end|>\n<|im_start|>assistant\n")
    parts = [text(part, add_special_tokens=False)["input_ids"] for part in (before, after)]
    ids = torch.tensor([[*parts[0], *[PLACEHOLDER] * count, *parts[1]]])
    direct = whole.prompt(ids, torch.ones_like(ids, dtype=torch.bool), latents)
    torch.testing.assert_close(prompt.embeddings, direct.embeddings, rtol=1e-5, atol=1e-6)
    assert whole.answer(prompt, max_new_tokens=3).shape == (1, 3)


def test_the_cache_saves_what_it_should(model: ContinuousLM, monkeypatch: pytest.MonkeyPatch) -> None:
    """64 steps after a prompt of 200: vectors that the language model computes, counted; the same result."""
    ids = torch.randint(0, 150, (1, 200))
    prompt = model.prompt(ids, torch.ones_like(ids, dtype=torch.bool))
    seen: list[int] = []
    call = ContinuousLM._call
    monkeypatch.setattr(ContinuousLM, "_call", lambda *a, **k: seen.append(a[1].shape[1]) or call(*a, **k))
    tokens = []
    for cache in (True, False):
        seen.clear()
        generator = torch.Generator().manual_seed(0)
        tokens.append(model.generate(prompt, SamplingConfig(64, "2"), generator, grid=(8, 8), cache=cache))
        known = [64 - left for left in [64, *masked_counts(64, 64)[:-1]]]
        images = [model.tokenizer.num_buffers + n for n in known]
        assert seen == ([200, *images] if cache else [200 + n for n in images])
    assert_close(tokens[0], tokens[1], GENERATION)


def test_save_and_load_give_the_same_model(model: ContinuousLM, tmp_path: Path) -> None:
    model.save(tmp_path / "saved")
    again = ContinuousLM.load(tmp_path / "saved")
    assert not again.training
    state = model.state_dict()
    assert again.state_dict().keys() == state.keys()
    assert all(torch.equal(tensor, state[name]) for name, tensor in again.state_dict().items())
    latents = model.tokenizer.encode(torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1)
    ids = torch.tensor([[1, *[PLACEHOLDER] * model.read(latents).shape[1], 2]])
    with torch.no_grad():
        embeddings = [m.prompt(ids, torch.ones_like(ids).bool(), latents).embeddings for m in (model, again)]
    assert torch.equal(*embeddings)


def test_foreign_directories_get_one_sentence(model: ContinuousLM, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"config.json: expected a config.json, got no such file"):
        ContinuousLM.load(tmp_path)
    model.tokenizer.save(tmp_path / "tokenizer")
    with pytest.raises(ValueError, match=r"config.json: kind: expected continuous_lm, got None"):
        ContinuousLM.load(tmp_path / "tokenizer")
    model.save(tmp_path / "saved")
    save_file({"proj_in.0.weight": torch.zeros(1)}, tmp_path / "saved" / "projectors.safetensors")
    with pytest.raises(ValueError, match="projectors: expected the tensors of proj_in with their shapes"):
        ContinuousLM.load(tmp_path / "saved")
