"""Gaussian diffusion with a cosine schedule, noise prediction and learned-range variance.

Sources: Ho et al., Denoising Diffusion Probabilistic Models (DDPM, arXiv 2006.11239); Nichol and Dhariwal, Improved
DDPM (IDDPM, arXiv 2102.09672); Ho and Salimans, Classifier-Free Diffusion Guidance (arXiv 2207.12598).
Tables are float64 on the CPU and are cast where they are used; x is the noisy value, `start` the clean one.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from jaxtyping import Float, Int, Num
from torch import Tensor

from tokenizers_mm._check import fail, require
from tokenizers_mm.functional.gaussian import discretized_log_likelihood, gaussian_kl

TRAIN_STEPS = 1000
"""Steps of the diffusion that is learned; sampling keeps some of them."""


@dataclass(frozen=True)
class Schedule:
    """The tables of a diffusion over T kept steps, float64 [T] each.

    timesteps: int64, the step of the learned diffusion that each kept step stands for (what the network is told).
    posterior_log_variance: of q(x_{t-1} | x_t, start), its first entry (of variance 0) replaced by the second.
    posterior_start, posterior_noisy: what start and x_t count in the posterior mean (DDPM, eq. 7).
    start_noisy, start_noise: start = start_noisy * x_t - start_noise * noise.
    """

    timesteps: Tensor
    betas: Tensor
    alphas_cumprod: Tensor
    posterior_variance: Tensor
    posterior_log_variance: Tensor
    posterior_start: Tensor
    posterior_noisy: Tensor
    start_noisy: Tensor
    start_noise: Tensor

    def __len__(self) -> int:
        return len(self.betas)


@lru_cache(maxsize=16)
def cosine_betas(steps: int, offset: float = 0.008, largest: float = 0.999) -> tuple[float, ...]:
    """Noise variances of the cosine schedule (IDDPM, eq. 17)."""

    def signal(t: float) -> float:
        return math.cos((t + offset) / (1 + offset) * math.pi / 2) ** 2

    return tuple(min(1 - signal((i + 1) / steps) / signal(i / steps), largest) for i in range(steps))


@lru_cache(maxsize=16)
def kept_timesteps(respacing: str, steps: int = TRAIN_STEPS) -> tuple[int, ...]:
    """Steps to keep: "100" spreads 100 evenly over 0 .. steps - 1, "ddim50" takes every (steps / 50)-th from 0 on."""
    digits = respacing.removeprefix("ddim")
    count = int(digits) if digits.isdigit() else 0
    if not 1 <= count <= steps:
        fail("respacing", f"'N' or 'ddimN' with N from 1 to {steps}", repr(respacing))
    if digits != respacing:
        strides = [s for s in range(1, steps + 1) if len(range(0, steps, s)) == count]
        require(len(strides) > 0, "respacing", f"a number of steps that a stride over {steps} gives", repr(respacing))
        return tuple(range(0, steps, strides[0]))
    stride = (steps - 1) / (count - 1) if count > 1 else 1.0
    return tuple(round(i * stride) for i in range(count))


def schedule(respacing: str = str(TRAIN_STEPS), steps: int = TRAIN_STEPS) -> Schedule:
    """The cosine diffusion over `steps`, reduced to the kept steps (IDDPM, section 4).

    Tensors are made anew with every call: those of a fake or an inference mode would be of no use outside of it.
    """
    kept = kept_timesteps(respacing, steps)
    options = {"dtype": torch.float64, "device": "cpu"}
    timesteps = torch.tensor(kept, dtype=torch.int64, device="cpu")
    full = (1 - torch.tensor(cosine_betas(steps), **options)).cumprod(0)
    one = torch.ones(1, **options)
    kept_cumprod = full[timesteps]
    betas = 1 - kept_cumprod / torch.cat([one, kept_cumprod[:-1]])
    alphas, cumprod = 1 - betas, (1 - betas).cumprod(0)
    before = torch.cat([one, cumprod[:-1]])
    variance = betas * (1 - before) / (1 - cumprod)
    clipped = variance.clone()
    clipped[0] = variance[min(1, len(variance) - 1)]
    return Schedule(
        timesteps=timesteps,
        betas=betas,
        alphas_cumprod=cumprod,
        posterior_variance=variance,
        posterior_log_variance=clipped.log(),
        posterior_start=betas * before.sqrt() / (1 - cumprod),
        posterior_noisy=(1 - before) * alphas.sqrt() / (1 - cumprod),
        start_noisy=(1 / cumprod).sqrt(),
        start_noise=(1 / cumprod - 1).sqrt(),
    )


def sinusoid(t: Num[Tensor, "n"], dim: int, longest: float = 10000.0) -> Float[Tensor, "n d"]:
    """Cosines, then sines, of t at dim / 2 frequencies from 1 down to almost 1 / longest, as float32.

    Computed in float64: in float32 the rounding of a frequency, times t, differs from one instruction set to another.
    """
    half = dim // 2
    frequencies = torch.exp(-math.log(longest) * torch.arange(half, dtype=torch.float64, device=t.device) / half)
    angles = t.double()[:, None] * frequencies
    return torch.cat([angles.cos(), angles.sin()], dim=-1).float()


def add_noise(
    start: Float[Tensor, "n d"], t: Int[Tensor, "n"], noise: Float[Tensor, "n d"], tables: Schedule
) -> Float[Tensor, "n d"]:
    """x_t of every row (DDPM, eq. 4)."""
    cumprod = tables.alphas_cumprod
    return _at(cumprod.sqrt(), t, start) * start + _at((1 - cumprod).sqrt(), t, start) * noise


def diffusion_terms(
    output: Float[Tensor, "n d2"],
    start: Float[Tensor, "n d"],
    t: Int[Tensor, "n"],
    noise: Float[Tensor, "n d"],
    tables: Schedule,
) -> tuple[Float[Tensor, "n"], Float[Tensor, "n"]]:
    """Per row: the mean squared error of the noise, and the variational bound in bits per dimension.

    The output of the network is [noise | variance]; the bound (IDDPM, section 3.1) moves the variance only.
    """
    predicted, variance = output.chunk(2, dim=-1)
    x = add_noise(start, t, noise, tables)

    def at(table: Tensor) -> Tensor:
        return _at(table, t, start)

    mean = at(tables.posterior_start) * start + at(tables.posterior_noisy) * x
    log_variance = at(tables.posterior_log_variance).expand_as(x)
    own_mean = _own_mean(x, predicted.detach(), at, tables)
    own_log_variance = _own_log_variance(variance, at, tables)
    divergence = gaussian_kl(mean, log_variance, own_mean, own_log_variance).mean(-1)
    likelihood = discretized_log_likelihood(start, own_mean, 0.5 * own_log_variance).mean(-1)
    bound = torch.where(t == 0, -likelihood, divergence) / math.log(2)
    return (noise - predicted).square().mean(-1), bound


def ancestral_step(
    x: Float[Tensor, "n d"], output: Float[Tensor, "n d2"], noise: Float[Tensor, "n d"], step: int, tables: Schedule
) -> Float[Tensor, "n d"]:
    """One step of sampling (DDPM, algorithm 2), without clipping; the last one (step 0) adds no noise."""
    predicted, variance = output.chunk(2, dim=-1)
    mean = _own_mean(x, predicted, lambda table: float(table[step]), tables)
    if step == 0:
        return mean
    return mean + (0.5 * _own_log_variance(variance, lambda table: float(table[step]), tables)).exp() * noise


def ancestral_sample(
    network: Callable[[Tensor, int], Tensor],
    start_noise: Float[Tensor, "n d"],
    step_noise: Sequence[Tensor],
    tables: Schedule,
    temperature: float = 1.0,
) -> Float[Tensor, "n d"]:
    """Run the diffusion backwards from standard normal noise, in float32.

    network: (x, original step) -> [noise | variance]. step_noise: one [n, d] per step, the first for the last t;
    `temperature` scales these and not the start.
    """
    require(len(step_noise) == len(tables), "step_noise", f"{len(tables)} draws", f"{len(step_noise)}")
    x = start_noise.float()
    for index, step in enumerate(reversed(range(len(tables)))):
        output = network(x, int(tables.timesteps[step])).float()
        x = ancestral_step(x, output, temperature * step_noise[index].float(), step, tables)
    return x


def guide(
    conditional: Float[Tensor, "n d2"], unconditional: Float[Tensor, "n d2"], scale: float
) -> Float[Tensor, "n d2"]:
    """Classifier-free guidance of the noise; the variance stays that of the conditional output."""
    noise, variance = conditional.chunk(2, dim=-1)
    other = unconditional.chunk(2, dim=-1)[0]
    return torch.cat([other + scale * (noise - other), variance], dim=-1)


def _at(table: Tensor, t: Tensor, like: Tensor) -> Tensor:
    """Entries of a table for every row, [n, 1], in the dtype of `like` but at least float32."""
    return table.to(torch.promote_types(like.dtype, torch.float32)).to(t.device)[t][:, None]


def _own_mean(x: Tensor, noise: Tensor, at: Callable[[Tensor], Tensor | float], tables: Schedule) -> Tensor:
    """The mean of p(x_{t-1} | x_t) that a predicted noise implies."""
    start = at(tables.start_noisy) * x - at(tables.start_noise) * noise
    return at(tables.posterior_start) * start + at(tables.posterior_noisy) * x


def _own_log_variance(variance: Tensor, at: Callable[[Tensor], Tensor | float], tables: Schedule) -> Tensor:
    """The learned log-variance, from that of the posterior (output -1) to that of the step (1); IDDPM, eq. 15."""
    share = (variance + 1) / 2
    return share * at(tables.betas.log()) + (1 - share) * at(tables.posterior_log_variance)
