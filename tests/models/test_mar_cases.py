"""MAR, DiffLoss and the KL-16 autoencoder against tensors of the original code."""

from typing import Any

import pytest
import torch
from torch import Tensor

from tests.cases import Case, case
from tests.mar_cases import GENERATION, GRADIENT, NETWORK, assert_close, build, gradients, recorded_noise
from tokenizers_mm.checkpoints.mar import kl_links_of, read_kl_config
from tokenizers_mm.checkpoints.upstream import take
from tokenizers_mm.decoders.diffusion import TokenDenoiser, TokenDenoiserConfig
from tokenizers_mm.functional.diffusion import add_noise, ancestral_sample, diffusion_terms, guide, schedule
from tokenizers_mm.functional.masking import mask_first, masked_mean
from tokenizers_mm.models.kl import KLAutoencoder
from tokenizers_mm.models.mar import MARDraws
from tokenizers_mm.models.mar_sampling import Plan, SamplingConfig, generate

DENOISER_RULES = {"time_embed.mlp": "time", "cond_embed": "condition", "input_proj": "embed", "res_blocks": "blocks"}


def test_kl16() -> None:
    reference = case("mar/kl16_vae")
    state, inputs, outputs = reference.tensors("state_dict"), reference.inputs, reference.outputs
    model = KLAutoencoder(read_kl_config(state, "case"))
    assert model.config.encoder.attention_levels == tuple(reference.config["attn_levels_encoder"])
    assert model.config.decoder.attention_levels == tuple(reference.config["attn_levels_decoder"])
    assert model.factor == 16
    prefix = "autoencoder."
    links = kl_links_of({prefix + n: tuple(t.shape) for n, t in model.state_dict().items()})
    model.load_state_dict({n.removeprefix(prefix): t for n, t in take(links, state, "case").items()})
    with torch.no_grad():
        x = inputs["pixel_values"]
        posterior = model.posterior(x)
        assert_close(model.encoder(x), outputs["encoder_out"], NETWORK, "encoder")
        assert_close(posterior.mean, outputs["mean"], NETWORK, "mean")
        assert_close(posterior.log_variance, outputs["logvar"], NETWORK, "logvar")
        assert_close(posterior.std, outputs["std"], NETWORK, "std")
        assert_close(posterior.kl(), outputs["kl"], NETWORK, "kl")
        assert_close(posterior.mean * reference.config["scale"], outputs["mode_scaled"], NETWORK, "scaled")
        sample = posterior.sample(inputs["sample_eps"])
        assert_close(sample, outputs["sample"], NETWORK, "sample")
        assert_close(model.decode(posterior.mean), outputs["decoded_mode"], NETWORK, "decoded mode")
        assert_close(model.decode(sample), outputs["decoded_sample"], NETWORK, "decoded sample")


def test_encoder_at_three_grids() -> None:
    reference = case("mar/harmon_encoder_understanding")
    model, _ = build(reference)
    inputs, outputs = reference.inputs, reference.outputs
    blocks: list[Any] = []
    hooks = [b.register_forward_hook(lambda _m, _i, out: blocks.append(out)) for b in model.encoder.blocks]
    with torch.no_grad():
        for index in range(3):
            grid = tuple(inputs[f"hw_{index}"].tolist())
            assert_close(model.encoder.position_table(grid), outputs[f"enc_pos_{index}"], NETWORK)
            before, after = model.decoder.position_tables(grid)
            assert_close(before, outputs[f"dec_pos_{index}"], NETWORK)
            assert_close(after, outputs[f"diff_pos_{index}"], NETWORK)
            assert_close(model.encoder(inputs[f"tokens_{index}"], grid), outputs[f"encoded_{index}"], NETWORK)
    for hook in hooks:
        hook.remove()
    for index in range(2):
        assert_close(blocks[index], outputs[f"block_{index}"], NETWORK, f"block {index}")


def test_masked_encoder_decoder_and_loss() -> None:
    reference = case("mar/harmon_masked_enc_dec_loss")
    model, links = build(reference)
    inputs, outputs, config = reference.inputs, reference.outputs, reference.config
    grid, mask = tuple(config["hw"]), inputs["mask"].bool()
    assert torch.equal(mask_first(inputs["orders"], config["n_masked"]), mask)
    tokens = inputs["tokens"]
    encoded = model.encoder(tokens, grid, mask)
    decoded = model.decoder(encoded, grid, mask)
    encoded.retain_grad()
    decoded.retain_grad()
    assert_close(encoded, outputs["encoded"], NETWORK, "encoded")
    assert_close(decoded, outputs["decoded"], NETWORK, "decoded")
    repeats = config["mar"]["diffusion_batch_mul"]
    start, t, noise = tokens.flatten(0, 1).repeat(repeats, 1), inputs["t"], inputs["noise"]
    output = model.denoiser(add_noise(start, t, noise, schedule()), t, decoded.flatten(0, 1).repeat(repeats, 1))
    assert_close(output, outputs["net_out"], NETWORK, "net_out")
    mse, bound = diffusion_terms(output, start, t, noise, schedule())
    assert_close(mse, outputs["mse_per_token"], NETWORK, "mse")
    assert_close(bound, outputs["vb_per_token"], NETWORK, "vb")
    loss = masked_mean(mse + bound, mask.flatten().repeat(repeats))
    terms = model.terms(decoded, tokens, MARDraws(mask, t, noise))
    torch.testing.assert_close(terms.noise + terms.bound, loss, rtol=1e-6, atol=0)
    assert_close(loss, outputs["loss"], NETWORK, "loss")
    loss.backward()
    compare_gradients(gradients(model, links), outputs, "grad:", at_least=8)
    assert encoded.grad is not None
    assert decoded.grad is not None
    assert_close(encoded.grad, outputs["grad_encoded"], GRADIENT, "grad_encoded")
    assert_close(decoded.grad, outputs["grad_decoded"], GRADIENT, "grad_decoded")


def test_class_conditional_training() -> None:
    reference = case("mar/mar_train_loss")
    model, links = build(reference)
    inputs, outputs = reference.inputs, reference.outputs
    tokens = inputs["imgs"].flatten(2).transpose(1, 2)
    draws = MARDraws(inputs["mask"].bool(), inputs["t"], inputs["noise"])
    assert model.config.noise_repeats * tokens.shape[0] * tokens.shape[1] == len(inputs["t"])
    terms = model(tokens, model.config.encoder.grid, draws, model.encoder.condition(inputs["labels"]))
    loss = terms.noise + terms.bound
    assert_close(loss, outputs["loss"], NETWORK, "loss")
    loss.backward()
    compare_gradients(gradients(model, links), outputs, "grad:", at_least=5)


@pytest.mark.parametrize("name", ["diffloss_sample_nocfg", "diffloss_sample_cfg3"])
def test_diffusion_sampling(name: str) -> None:
    reference = case(f"mar/{name}")
    denoiser, inputs, config = build_denoiser(reference), reference.inputs, reference.config
    z, rows = inputs["z"], inputs["init_noise"].shape[0]

    def network(x: Tensor, t: int) -> Tensor:
        steps = torch.tensor([t])
        if config["cfg"] == 1:
            return denoiser(x, steps, z)
        output = denoiser(x.repeat(2, 1), steps, z)
        return guide(output[:rows], output[rows:], config["cfg"])

    with torch.no_grad():
        noise = list(inputs["step_noise"][:, :rows])
        tables = schedule(config["num_sampling_steps"])
        sample = ancestral_sample(network, inputs["init_noise"], noise, tables, config["temperature"])
    expected = reference.outputs["sample"][:rows]  # under guidance the other half never reaches the network
    assert_close(sample, expected, GENERATION, "sample")


@pytest.mark.parametrize("name", ["mar_sample_tokens_nocfg", "mar_sample_tokens_cfg_linear"])
def test_class_conditional_generation(name: str) -> None:
    reference = case(f"mar/{name}")
    model, _ = build(reference)
    inputs, config = reference.inputs, reference.config
    sampling = SamplingConfig(
        steps=config["num_iter"],
        diffusion=config["mar"]["num_sampling_steps"],
        guidance=config["cfg"],
        guidance_schedule=config["cfg_schedule"],
        temperature=config["temperature"],
    )
    plan = Plan(inputs["orders"], torch.zeros(2, 36, 8))
    tokens = generate(model, inputs["labels"], sampling, plan=plan, noise=recorded_noise(inputs))
    assert_close(tokens.transpose(1, 2).unflatten(2, (6, 6)), reference.outputs["latents"], GENERATION, "latents")


def build_denoiser(reference: Case) -> TokenDenoiser:
    """The bare DiffLoss network of a case, by names written out a second time."""
    config = reference.config
    dims = (config["target_channels"], config["z_channels"], config["width"], config["depth"])
    denoiser = TokenDenoiser(TokenDenoiserConfig(*dims))
    state = {}
    for name, tensor in reference.tensors("state_dict").items():
        name = name.removeprefix("net.").replace("adaLN_modulation.1", "modulation").replace("in_ln", "norm")
        name = name.replace("final_layer.linear", "out").replace("final_layer.", "")
        for theirs, ours in DENOISER_RULES.items():
            name = name.replace(theirs, ours)
        state[name] = tensor
    denoiser.load_state_dict(state)
    return denoiser.eval()


def compare_gradients(own: dict[str, Tensor], outputs: dict[str, Tensor], prefix: str, at_least: int) -> None:
    """Every gradient that the case holds."""
    names = [key.removeprefix(prefix) for key in outputs if key.startswith(prefix)]
    assert len(names) >= at_least
    for name in names:
        assert_close(own[name], outputs[prefix + name], GRADIENT, name)
