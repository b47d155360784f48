"""Diffusion tables against the original's in 64 bits, the terms against a plain second writing, and where they lead."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from tests.cases import case
from tokenizers_mm.functional.diffusion import (
    add_noise,
    ancestral_sample,
    diffusion_terms,
    guide,
    kept_timesteps,
    schedule,
    sinusoid,
)
from tokenizers_mm.functional.gaussian import DiagonalGaussian, discretized_log_likelihood, gaussian_kl

TABLES = {
    "betas": "betas",
    "alphas_cumprod": "alphas_cumprod",
    "posterior_variance": "posterior_variance",
    "posterior_log_variance": "posterior_log_variance_clipped",
    "posterior_start": "posterior_mean_coef1",
    "posterior_noisy": "posterior_mean_coef2",
    "start_noisy": "sqrt_recip_alphas_cumprod",
    "start_noise": "sqrt_recipm1_alphas_cumprod",
}


@pytest.mark.parametrize("respacing", ["1000", "100", "50", "25", "10", "8", "ddim50"])
def test_tables(respacing: str) -> None:
    outputs = case("mar/diffusion_schedules").outputs
    tables = schedule(respacing)
    assert torch.equal(tables.timesteps, outputs[f"{respacing}.timestep_map"])
    for ours, theirs in TABLES.items():
        expected = outputs[f"{respacing}.{theirs}_f64"]
        torch.testing.assert_close(getattr(tables, ours), expected, rtol=1e-12, atol=0, msg=f"{respacing} {ours}")


def test_sinusoid() -> None:
    """Equal to float64; the original's angles are float32, off by up to t * 2^-23 (1 ulp of a frequency)."""
    reference = case("mar/diffusion_schedules")
    t = reference.inputs["t"]
    actual = sinusoid(t, 256)
    angles = [[float(step) * 10000.0 ** (-i / 128) for i in range(128)] for step in t]
    exact = torch.tensor([[*map(math.cos, row), *map(math.sin, row)] for row in angles])
    torch.testing.assert_close(actual, exact, rtol=0, atol=1e-7)
    assert ((actual - reference.outputs["t_sinusoid_256"]).abs() <= t[:, None] * 2.0**-23 + 1e-6).all()


@pytest.mark.parametrize("bad", ["0", "1001", "ddim501", "fast", ""])
def test_bad_respacing(bad: str) -> None:
    with pytest.raises(ValueError, match="respacing: expected"):
        kept_timesteps(bad)


def test_terms_against_a_second_writing_in_64_bits() -> None:
    generator = torch.Generator().manual_seed(0)
    start, noise = (torch.randn(7, 3, generator=generator, dtype=torch.float64) for _ in range(2))
    output = torch.randn(7, 6, generator=generator, dtype=torch.float64)
    t = torch.tensor([0, 0, 1, 2, 500, 998, 999])
    mse, bound = diffusion_terms(output, start, t, noise, schedule())
    betas = schedule().betas.numpy()
    signal = np.cumprod(1 - betas)
    for row, step in enumerate(t.tolist()):
        before = signal[step - 1] if step else 1.0
        x = math.sqrt(signal[step]) * start[row].numpy() + math.sqrt(1 - signal[step]) * noise[row].numpy()
        eps, v = output[row, :3].numpy(), output[row, 3:].numpy()

        def mean(x0: np.ndarray, x=x, step=step, before=before) -> np.ndarray:
            first = math.sqrt(before) * betas[step] * x0
            return (first + math.sqrt(1 - betas[step]) * (1 - before) * x) / (1 - signal[step])

        guess = (x - math.sqrt(1 - signal[step]) * eps) / math.sqrt(signal[step])
        later = max(step, 1)
        low = math.log(betas[later] * (1 - signal[later - 1]) / (1 - signal[later]))
        log_variance = (v + 1) / 2 * math.log(betas[step]) + (1 - v) / 2 * low
        if step:
            distance = (mean(start[row].numpy()) - mean(guess)) ** 2 / np.exp(log_variance)
            expected = 0.5 * (np.exp(low - log_variance) + distance - 1 + log_variance - low)
        else:
            args = (start[row], torch.tensor(mean(guess)), torch.tensor(log_variance / 2))
            expected = -discretized_log_likelihood(*args).numpy()
        # float64 rounding is multiplied by up to 2e4 where the signal is almost gone
        assert float(bound[row]) == pytest.approx(expected.mean() / math.log(2), rel=1e-9)
        assert float(mse[row]) == pytest.approx(((noise[row].numpy() - eps) ** 2).mean(), rel=1e-12)


def test_the_bound_moves_the_variance_only() -> None:
    output = torch.randn(5, 6, requires_grad=True)
    start, noise = torch.randn(5, 3), torch.randn(5, 3)
    mse, bound = diffusion_terms(output, start, torch.tensor([0, 1, 10, 500, 999]), noise, schedule())
    (from_bound,) = torch.autograd.grad(bound.sum(), output, retain_graph=True)
    (from_mse,) = torch.autograd.grad(mse.sum(), output)
    assert float(from_bound[:, :3].abs().max()) == 0
    assert float(from_bound[:, 3:].abs().min()) > 0
    assert float(from_mse[:, 3:].abs().max()) == 0


def test_sampling_with_the_true_noise_finds_the_data() -> None:
    """Data is one point: the exact noise predictor leads every start to it."""
    tables, point = schedule("50"), torch.tensor([0.3, -0.8])

    def exact(x: torch.Tensor, t: int) -> torch.Tensor:
        signal = schedule().alphas_cumprod[t]
        noise = (x - signal.sqrt() * point) / (1 - signal).sqrt()
        return torch.cat([noise, -torch.ones_like(noise)], -1).float()

    generator = torch.Generator().manual_seed(0)
    first, rest = torch.randn(20, 2, generator=generator), torch.randn(50, 20, 2, generator=generator)
    sample = ancestral_sample(exact, first, list(rest), tables)
    torch.testing.assert_close(sample, point.expand(20, 2), rtol=0, atol=1e-4)
    with pytest.raises(ValueError, match="step_noise: expected 50 draws, got 49"):
        ancestral_sample(exact, first, list(rest[1:]), tables)


def test_noise_has_the_variance_of_the_schedule() -> None:
    start = torch.full((4000, 1), 2.0)
    noise = torch.randn(4000, 1, generator=torch.Generator().manual_seed(0))
    for t in (10, 500, 990):
        x = add_noise(start, torch.full((4000,), t), noise, schedule())
        signal = float(schedule().alphas_cumprod[t])
        assert float(x.mean()) == pytest.approx(2 * math.sqrt(signal), abs=4 * math.sqrt((1 - signal) / 4000))
        assert float(x.var()) == pytest.approx(1 - signal, rel=0.12)


def test_guidance() -> None:
    first, second = torch.tensor([[1.0, 5.0]]), torch.tensor([[0.0, 7.0]])
    assert guide(first, second, 3.0).tolist() == [[3.0, 5.0]]
    assert torch.equal(guide(first, second, 1.0), first)


def test_gaussian() -> None:
    moments = torch.randn(2, 6, 3, 4, dtype=torch.float64)
    posterior = DiagonalGaussian.from_moments(moments)
    ours = torch.distributions.Normal(posterior.mean, posterior.std)
    other = torch.distributions.Normal(torch.full_like(posterior.mean, 0.5), torch.tensor(2.0, dtype=torch.float64))
    expected = torch.distributions.kl_divergence(ours, other)
    log_variance = torch.full_like(posterior.mean, math.log(4.0))
    actual = gaussian_kl(posterior.mean, posterior.log_variance, torch.full_like(posterior.mean, 0.5), log_variance)
    torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-12)
    extreme = DiagonalGaussian.from_moments(torch.tensor([0.0, -100.0]).view(1, 2, 1, 1))
    assert float(extreme.log_variance) == -30.0


def test_discretized_likelihood_is_a_distribution() -> None:
    """Over the 256 levels the probabilities add to 1: exactly, but for the clamp at 1e-12."""
    levels = torch.linspace(-1, 1, 256, dtype=torch.float64)
    for mean, std in ((0.1, 0.05), (-0.98, 0.2), (0.0, 2.0)):
        constant = torch.ones_like(levels)
        total = discretized_log_likelihood(levels, mean * constant, math.log(std) * constant)
        assert float(total.exp().sum()) == pytest.approx(1.0, abs=1e-9)


@pytest.mark.parametrize("mode", [FakeTensorMode, torch.inference_mode])
def test_tables_that_a_mode_was_the_first_to_ask_for(mode: Any) -> None:
    """They are kept by nobody: a loss outside of the mode has tensors of its own, with gradients."""
    with mode():
        schedule("7")
    start, output = torch.randn(2, 3), torch.randn(2, 6, requires_grad=True)
    terms = diffusion_terms(output, start, torch.tensor([0, 6]), torch.randn(2, 3), schedule("7"))
    torch.stack(terms).sum().backward()
    assert output.grad is not None
    assert bool(output.grad.isfinite().all())
