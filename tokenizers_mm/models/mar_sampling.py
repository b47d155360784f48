"""Generation of MAR tokens: a few at a time in a random order, each drawn by its own small diffusion.

Source: Li et al., MAR (arXiv 2406.11838), sections 3.3 and 4; guidance as in section 5. What encodes the known tokens
is passed in, so that a class-conditional model and a language model (Harmon) share one loop.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Literal

import torch
from torch import Tensor

from tokenizers_mm._check import require
from tokenizers_mm.config import Pattern, Range
from tokenizers_mm.functional.diffusion import ancestral_sample, guide, kept_timesteps, schedule
from tokenizers_mm.functional.masking import mask_first, masked_counts, positions_where, put, random_orders, take
from tokenizers_mm.models.mar import MAR, Grid

Encode = Callable[[Tensor, Tensor], Tensor]
"""(tokens [R, L, D], mask [R, L]) -> the encoder's output [R, num_buffers + n, C].

Under guidance R = 2 B: the conditional samples, then the unconditional ones.
"""

Noise = Callable[[int, int, int], tuple[Tensor, Tensor]]
"""(step, rows n, diffusion steps T) -> the first noise [n, D] and that of every diffusion step [T, n, D].

Rows are tokens, sample by sample, row-major. Two calls for one step must not be made.
"""


@dataclass(frozen=True)
class SamplingConfig:
    """Settings for drawing tokens.

    steps: in how many steps all tokens appear (cosine schedule). diffusion: steps kept for each token, such as "100".
    guidance: classifier-free guidance scale, 1 for none; "linear" lets it grow from 1 with the share of known
    tokens. temperature: of the noise inside the diffusion.
    """

    steps: Annotated[int, Range(1, 1 << 16)] = 64
    diffusion: Annotated[str, Pattern(r"(ddim)?[0-9]{1,4}", "'N' or 'ddimN'")] = "100"
    guidance: Annotated[float, Range(0, 1000)] = 1.0
    guidance_schedule: Literal["constant", "linear"] = "constant"
    temperature: Annotated[float, Range(0, 1000)] = 1.0

    def check(self) -> None:
        """Refuse a number of diffusion steps that cannot be kept."""
        kept_timesteps(self.diffusion)


@dataclass(frozen=True)
class Plan:
    """Positions to draw, in their orders, and the tokens that are given.

    orders: int64 [B, M], positions to fill; the LAST ones come first. tokens: [B, L, D], read where a position is in no
    order (in-painting); all other values are ignored.
    """

    orders: Tensor
    tokens: Tensor

    def __post_init__(self) -> None:
        length = self.tokens.shape[1]
        batch, count = self.orders.shape if self.orders.ndim == 2 else (-1, -1)
        expected = f"int64 [{self.tokens.shape[0]}, 1 to {length}]"
        fits = batch == self.tokens.shape[0] and 1 <= count <= length and self.orders.dtype == torch.int64
        require(fits, "orders", expected, self.orders)
        low, high = int(self.orders.min()), int(self.orders.max())
        require(low >= 0 and high < length, "orders", f"positions from 0 to {length - 1}", f"{low} to {high}")
        distinct = bool((mask_first(self.orders, count, length).sum(1) == count).all())
        require(distinct, "orders", "each position at most once", "one twice")


def plan_all(model: MAR, batch: int, grid: Grid, generator: torch.Generator | None = None) -> Plan:
    """All tokens of a grid, in random orders."""
    length = grid[0] * grid[1]
    tokens = torch.zeros(batch, length, model.config.encoder.token_dim, device=model.device, dtype=model.dtype)
    return Plan(random_orders(batch, length, generator).to(model.device), tokens)


def plan_masked(tokens: Tensor, mask: Tensor, generator: torch.Generator | None = None) -> Plan:
    """The tokens that a mask (bool [B, L], equally many per sample) hides, in random orders; the others are given."""
    hidden = positions_where(mask)
    shuffle = random_orders(*hidden.shape, generator=generator).to(hidden.device)
    return Plan(hidden.gather(1, shuffle), tokens)


def draw_noise(dim: int, generator: torch.Generator | None = None, device: torch.device | str = "cpu") -> Noise:
    """Noise drawn in the order of use, on the CPU, so that a seed gives the same image on every device."""

    def draw(step: int, rows: int, diffusion_steps: int) -> tuple[Tensor, Tensor]:
        first = torch.randn(rows, dim, generator=generator)
        return first.to(device), torch.randn(diffusion_steps, rows, dim, generator=generator).to(device)

    return draw


@torch.no_grad()
def sample(model: MAR, encode: Encode, grid: Grid, plan: Plan, config: SamplingConfig, noise: Noise) -> Tensor:
    """Tokens [B, h * w, D] with every position of the plan filled in; float32.

    The tokens of one step, of all samples, go through the denoiser together.
    """
    tokens, orders = plan.tokens.clone().float(), plan.orders
    length = tokens.shape[1]
    guided = config.guidance != 1.0
    mask = mask_first(orders, orders.shape[1], length)
    for step, left in enumerate(masked_counts(orders.shape[1], config.steps)):
        copies = 2 if guided else 1
        all_tokens, all_masks = tokens.to(model.dtype).repeat(copies, 1, 1), mask.repeat(copies, 1)
        z = model.decoder(encode(all_tokens, all_masks), grid, all_masks)
        after = mask_first(orders, left, length)
        revealed = positions_where(mask & ~after)
        scale = _guidance(config, left, orders.shape[1]) if guided else None
        drawn = draw_tokens(model, take(z, revealed.repeat(copies, 1)).flatten(0, 1), scale, config, noise, step)
        tokens, mask = put(tokens, revealed, drawn.unflatten(0, revealed.shape)), after
    return tokens


def draw_tokens(
    model: MAR, z: Tensor, guidance: float | None, config: SamplingConfig, noise: Noise, step: int
) -> Tensor:
    """One token [n, D] for every condition vector in z [n, C]; under guidance z is [2 n, C], conditional ones first."""
    tables = schedule(config.diffusion)
    projected = model.denoiser.condition(z)
    rows = z.shape[0] if guidance is None else z.shape[0] // 2
    first, rest = noise(step, rows, len(tables))

    def network(x: Tensor, t: int) -> Tensor:
        steps = torch.full((1,), t, device=x.device)
        if guidance is None:
            return model.denoiser.predict(x, steps, projected)
        output = model.denoiser.predict(x.repeat(2, 1), steps, projected).float()
        return guide(output[:rows], output[rows:], guidance)

    return ancestral_sample(network, first, list(rest), tables, config.temperature)


def generate(
    model: MAR,
    labels: Tensor,
    config: SamplingConfig,
    generator: torch.Generator | None = None,
    *,
    grid: Grid | None = None,
    plan: Plan | None = None,
    noise: Noise | None = None,
) -> Tensor:
    """Class-conditional tokens [B, h * w, D] for labels int64 [B] (-1: no class); `model.latents` makes them decodable.

    All chance comes from the generator, or from an explicit plan and noise.
    """
    shape = grid or model.config.encoder.grid
    plan = plan_all(model, len(labels), shape, generator) if plan is None else plan
    noise = draw_noise(model.config.encoder.token_dim, generator, model.device) if noise is None else noise
    with torch.no_grad():
        condition = model.encoder.condition(labels.to(model.device))
        if config.guidance != 1.0:
            condition = torch.cat([condition, model.encoder.no_class.expand_as(condition)])
    return sample(model, lambda tokens, mask: model.encoder(tokens, shape, mask, condition), shape, plan, config, noise)


def _guidance(config: SamplingConfig, left: int, count: int) -> float:
    """The scale of a step after which `left` of `count` tokens are masked; the last step counts as if one were."""
    share = 1 - max(left, 1) / count
    return config.guidance if config.guidance_schedule == "constant" else 1 + (config.guidance - 1) * share
