"""The MAR tokenizer at a tiny size: one road, any size, saving, sampling, training, errors."""

import dataclasses
from pathlib import Path

import pytest
import torch
from PIL import Image

import tokenizers_mm as tmm
from tests.mar_cases import tiny_config
from tokenizers_mm.decoders.diffusion import TokenDenoiserConfig
from tokenizers_mm.decoders.mar import MARDecoderConfig
from tokenizers_mm.encoders.mar import MAREncoderConfig
from tokenizers_mm.models import MAR, MARConfig
from tokenizers_mm.models.kl import KLConfig
from tokenizers_mm.models.mar import MARDraws, buffers_first, buffers_last, decay_groups, drop_labels
from tokenizers_mm.models.mar_sampling import Plan, SamplingConfig, draw_noise, generate, plan_masked


@pytest.fixture(scope="module")
def tokenizer() -> MAR:
    torch.manual_seed(0)
    model = MAR.from_config(tiny_config()).eval()
    for block in model.denoiser.blocks:  # zero at the start, which would hide mistakes
        torch.nn.init.normal_(block.modulation.weight, std=0.1)  # type: ignore[arg-type]
    torch.nn.init.normal_(model.denoiser.out.weight, std=0.1)
    return model


@pytest.fixture(scope="module")
def images() -> torch.Tensor:
    return torch.rand(2, 3, 32, 48, generator=torch.Generator().manual_seed(1)) * 2 - 1


def test_an_image_and_back(tokenizer: MAR, images: torch.Tensor) -> None:
    latents = tokenizer.encode(images)
    assert latents.values.shape == (2, 24, 4)
    assert (latents.height, latents.width, latents.grid) == (32, 48, (4, 6))
    assert tokenizer.streams(32, 48) == ()
    with torch.no_grad():
        posterior = tokenizer.autoencoder.posterior(images)
        direct = tokenizer.autoencoder.decode(posterior.mean)
        torch.testing.assert_close(tokenizer.decode(latents), direct, rtol=0, atol=1e-5)
        sampled = tokenizer.encode_tensor(images, noise=torch.ones_like(posterior.mean))
    expected = (posterior.mean + posterior.std) * 0.2325
    torch.testing.assert_close(tokenizer.vectors(sampled), expected.permute(0, 2, 3, 1))
    features = tokenizer.features(images)
    assert features.shape == (2, 24 + 3, 24)
    torch.testing.assert_close(features, tokenizer.features(latents))
    encoded = tokenizer.encoder(latents.values, latents.grid)
    torch.testing.assert_close(buffers_first(features, 3), encoded)
    assert torch.equal(buffers_first(buffers_last(encoded, 3), 3), encoded)


def test_pictures_of_any_size(tokenizer: MAR) -> None:
    assert tokenizer.encode(Image.new("RGB", (40, 24))).grid == (3, 5)
    with pytest.raises(ValueError, match="multiples of 8, got 20 x 24"):
        tokenizer.encode(Image.new("RGB", (24, 20)))
    with pytest.raises(ValueError, match=r"ids: expected latents \(this tokenizer is continuous\)"):
        tokenizer.decode_ids(torch.zeros(1, 16, dtype=torch.int64), 32, 32)


def test_save_and_load(tokenizer: MAR, images: torch.Tensor, tmp_path: Path) -> None:
    tokenizer.save(tmp_path / "tok")
    again = tmm.load(tmp_path / "tok")
    assert isinstance(again, MAR)
    assert again.config == tokenizer.config
    assert torch.equal(again.encode(images).values, tokenizer.encode(images).values)
    assert torch.equal(again.features(images), tokenizer.features(images))


def test_hidden_tokens_do_not_reach_the_encoder(tokenizer: MAR) -> None:
    mask = torch.zeros(2, 16, dtype=torch.bool)
    mask[0, :9], mask[1, 4:13] = True, True
    tokens = torch.randn(2, 16, 4)
    others = torch.where(mask[..., None], torch.randn(2, 16, 4), tokens)
    with torch.no_grad():
        encoded = tokenizer.encoder(tokens, (4, 4), mask)
        assert encoded.shape == (2, 3 + 7, 24)
        assert torch.equal(encoded, tokenizer.encoder(others, (4, 4), mask))
        assert tokenizer.decoder(encoded, (4, 4), mask).shape == (2, 16, 24)
    uneven = mask.clone()
    uneven[0, 15] = True
    with pytest.raises(ValueError, match="same number of masked tokens"):
        tokenizer.encoder(tokens, (4, 4), uneven)
    with pytest.raises(ValueError, match=r"tokens: expected float \[B, 12, 4\] for a grid of 3 x 4"):
        tokenizer.encoder(tokens, (3, 4))
    with pytest.raises(ValueError, match=r"encoded: expected float \[2, 10, 24\]"):
        tokenizer.decoder(encoded[:, 1:], (4, 4), mask)


@pytest.mark.parametrize("guidance", [1.0, 2.5])
def test_sampling_is_decided_by_the_seed_and_by_nothing_else(tokenizer: MAR, guidance: float) -> None:
    config = SamplingConfig(steps=4, diffusion="8", guidance=guidance, guidance_schedule="linear")
    labels = torch.tensor([0, 3, -1])

    def run(seed: int) -> torch.Tensor:
        return generate(tokenizer, labels, config, torch.Generator().manual_seed(seed))

    before = torch.get_rng_state()
    first = run(5)
    assert torch.equal(first, run(5))
    assert torch.equal(torch.get_rng_state(), before)
    assert not torch.equal(first, run(6))
    images = tokenizer.decode(tokenizer.latents(first, (4, 4)))
    assert images.shape == (3, 3, 32, 32)
    assert bool(torch.isfinite(images).all())


def test_tokens_of_a_step_go_through_the_denoiser_together(tokenizer: MAR, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two steps for 2 images of 8 x 8: 19 tokens each, then 45; one call per diffusion step."""
    rows: list[int] = []
    predict = tokenizer.denoiser.predict
    monkeypatch.setattr(tokenizer.denoiser, "predict", lambda x, *rest: rows.append(len(x)) or predict(x, *rest))
    config = SamplingConfig(steps=2, diffusion="5")
    generate(tokenizer, torch.tensor([1, 2]), config, torch.Generator().manual_seed(0), grid=(8, 8))
    assert rows == [2 * 19] * 5 + [2 * 45] * 5


def test_samples_do_not_depend_on_their_neighbours(tokenizer: MAR) -> None:
    config = SamplingConfig(steps=3, diffusion="6", guidance=2.0)
    orders = torch.stack([torch.randperm(16), torch.randperm(16)])
    noise = draw_noise(4, torch.Generator().manual_seed(0))
    counts = [3, 5, 8]  # of 16 tokens in 3 steps: 13, 8 and 0 stay masked
    drawn = [noise(step, 2 * count, 6) for step, count in enumerate(counts)]

    def rows(which: slice):
        def noise(step: int, count: int, _: int) -> tuple[torch.Tensor, torch.Tensor]:
            first, rest = drawn[step]
            picked = slice(which.start * counts[step], which.stop * counts[step])
            assert count == picked.stop - picked.start
            return first[picked], rest[:, picked]

        return noise

    both = generate(tokenizer, torch.tensor([1, 2]), config, plan=_plan(orders), noise=rows(slice(0, 2)))
    second = generate(tokenizer, torch.tensor([2]), config, plan=_plan(orders[1:]), noise=rows(slice(1, 2)))
    torch.testing.assert_close(both[1:], second, rtol=1e-4, atol=1e-4)


def _plan(orders: torch.Tensor) -> Plan:
    return Plan(orders, torch.zeros(len(orders), orders.shape[1], 4))


def test_in_painting(tokenizer: MAR) -> None:
    tokens, mask = torch.randn(2, 16, 4), torch.zeros(2, 16, dtype=torch.bool)
    mask[:, 8:] = True
    plan = plan_masked(tokens, mask, torch.Generator().manual_seed(0))
    assert torch.equal(plan.orders.sort(1).values, torch.arange(8, 16).expand(2, 8))
    config = SamplingConfig(steps=3, diffusion="6")
    filled = generate(tokenizer, torch.tensor([0, 1]), config, torch.Generator().manual_seed(0), plan=plan)
    assert torch.equal(filled[:, :8], tokens[:, :8])
    assert bool((filled[:, 8:] != tokens[:, 8:]).all())


@pytest.mark.parametrize(
    ("orders", "message"),
    [
        (torch.tensor([[0, 1], [1, 1]]), "each position at most once, got one twice"),
        (torch.tensor([[0, 16], [1, 2]]), "positions from 0 to 15, got 0 to 16"),
        (torch.tensor([[0, 1]]), r"int64 \[2, 1 to 16\], got int64 \[1, 2\]"),
        (torch.zeros(2, 2), r"got float32 \[2, 2\]"),
    ],
)
def test_bad_orders(orders: torch.Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=f"orders: expected {message}" if "got float" not in message else message):
        Plan(orders, torch.zeros(2, 16, 4))


def test_a_reduced_training_step_lowers_the_loss(tokenizer: MAR) -> None:
    torch.manual_seed(0)
    model = MAR.from_config(tiny_config()).train()
    model.autoencoder.requires_grad_(False)
    optimizer = torch.optim.AdamW(decay_groups(model, 0.02), lr=3e-3, betas=(0.9, 0.95))
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randn(1, 16, 4, generator=generator).expand(4, 16, 4)
    labels = drop_labels(torch.zeros(4, dtype=torch.int64), 0.1, generator)
    losses = []
    for _ in range(40):
        terms = model(tokens, (4, 4), model.draw(4, 16, generator), model.encoder.condition(labels))
        loss = terms.noise + terms.bound
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        losses.append(float(terms.noise.detach()))
    assert sum(losses[-10:]) < 0.75 * sum(losses[:10])
    assert all(p.grad is None for p in model.autoencoder.parameters())


def test_no_gradient_reaches_the_latents_and_one_reaches_every_part(tokenizer: MAR) -> None:
    tokens = torch.randn(2, 16, 4, requires_grad=True)
    draws = tokenizer.draw(2, 16, torch.Generator().manual_seed(0))
    terms = tokenizer.terms(torch.randn(2, 16, 24), tokens, draws)
    with pytest.raises(RuntimeError, match="not have been used"):
        torch.autograd.grad(terms.noise, tokens)
    visible = tokenizer(tokens, (4, 4), draws)
    (grad,) = torch.autograd.grad(visible.noise, tokens)  # through the encoder: visible tokens only
    assert float(grad[draws.mask].abs().max()) == 0
    bad = MARDraws(draws.mask, draws.steps[:-1], draws.noise)
    with pytest.raises(ValueError, match=r"draws.steps: expected a multiple of 32 rows"):
        tokenizer.terms(torch.randn(2, 16, 24), tokens, bad)


def test_decay_groups(tokenizer: MAR) -> None:
    names = {id(p): n for n, p in tokenizer.named_parameters()}
    decayed, free = ([names[id(p)] for p in g["params"]] for g in decay_groups(tokenizer, 0.02))  # type: ignore[attr-defined]
    assert len(decayed) + len(free) == len(names)
    assert all(n.startswith("denoiser.") or n.endswith("bias") or "norm" in n for n in free)
    assert "encoder.positions" in decayed
    assert "encoder.blocks.0.attn.qkv.weight" in decayed
    assert not [n for n in decayed if n.startswith("denoiser.") or n.endswith(".bias")]


def test_labels(tokenizer: MAR) -> None:
    condition = tokenizer.encoder.condition(torch.tensor([-1, 4]))
    assert torch.equal(condition[0], tokenizer.encoder.no_class[0])
    assert torch.equal(condition[1], tokenizer.encoder.classes.weight[4])
    with pytest.raises(ValueError, match="values from -1 to 4, got values from 5 to 5"):
        tokenizer.encoder.condition(torch.tensor([5]))
    dropped = drop_labels(torch.zeros(4000, dtype=torch.int64), 0.1, torch.Generator().manual_seed(0))
    assert float((dropped == -1).float().mean()) == pytest.approx(0.1, abs=0.02)  # 4 standard errors


def test_parts_must_agree() -> None:
    config = tiny_config()
    for change, message in [
        ({"denoiser": TokenDenoiserConfig(token_dim=5, condition_dim=24)}, "token_dim: expected one value"),
        ({"decoder": dataclasses.replace(config.decoder, num_buffers=4)}, "num_buffers: expected one .* got 3 and 4"),
        ({"decoder": dataclasses.replace(config.decoder, grid=(2, 2))}, "grid"),
        ({"decoder": dataclasses.replace(config.decoder, encoder_width=8)}, "encoder_width"),
    ]:
        with pytest.raises(ValueError, match=message):
            MAR.from_config(dataclasses.replace(config, **change))
    pixel = dataclasses.replace(config.autoencoder.encoder, out_channels=7)
    with pytest.raises(ValueError, match=r"encoder.out_channels: expected 2 \* decoder.in_channels = 8, got 7"):
        MAR.from_config(dataclasses.replace(config, autoencoder=KLConfig(pixel, config.autoencoder.decoder)))


@pytest.mark.parametrize(
    ("width", "depth", "heads", "denoiser", "parameters"),
    [
        (768, 12, 12, (1024, 6), 207_924_768),
        (1024, 16, 16, (1280, 8), 478_326_304),
        (1280, 20, 16, (1536, 12), 942_403_104),
    ],
)
def test_published_sizes(width: int, depth: int, heads: int, denoiser: tuple[int, int], parameters: int) -> None:
    """The published numbers of parameters of B, L and H, and of the autoencoder."""
    config = MARConfig(
        encoder=MAREncoderConfig(width=width, depth=depth, heads=heads),
        decoder=MARDecoderConfig(encoder_width=width, width=width, depth=depth, heads=heads),
        denoiser=TokenDenoiserConfig(condition_dim=width, width=denoiser[0], depth=denoiser[1]),
    )
    with torch.device("meta"):
        model = MAR.from_config(config)
    total = sum(p.numel() for p in model.parameters())
    autoencoder = sum(p.numel() for p in model.autoencoder.parameters())
    assert autoencoder == 66_456_019
    assert total - autoencoder == parameters
