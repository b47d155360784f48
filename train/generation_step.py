"""One step of either stage of `train.generation`, to be read aloud.

Chance is a function of the seed, the stage, the step and the row in the batch of all processes together. So a run can
be taken up at any step, and several processes, or several micro-batches, draw what one large batch would. (Dropout
inside the networks is apart: it depends on the step and on how its batch is divided.)
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from tokenizers_mm.data.sources import Batch, mix_seeds

from .descent import descend
from .generation_state import GenerationState
from .ranks import sum_counts
from .schedule import learning_rate

Rows = list[torch.Generator]
"""A generator for every sample of a micro-batch."""


def train_step(state: GenerationState, batches: Sequence[Batch], progress: float) -> dict[str, float]:
    """One step over the micro-batches; returns what to report, means over the samples of all ranks.

    progress: share of the stage that is done, in [0, 1), for the learning rate.
    """
    config, accelerator, learning = state.config, state.accelerator, state.stage == "mar"
    terms, prefix = (_mar_terms, "") if learning else (_autoencoder_terms, "autoencoder ")
    options = config.optimizer if learning else config.autoencoder.optimizer
    optimizer = state.optimizer if learning else state.autoencoder_optimizer
    rate = learning_rate(options, state.within, progress)
    sums: dict[str, Tensor] = {}
    state.model.train()
    if learning:
        state.model.tokenizer.autoencoder.eval()

    for index, batch in enumerate(batches):
        rows = _generators(state, index)
        loss, values = terms(state, batch.images.to(accelerator.device), batch.captions, rows)
        accelerator.backward(loss / len(batches))
        for name, value in {"loss": loss, **values}.items():
            sums[name] = sums.get(name, 0.0) + value.detach().double() / (len(batches) * accelerator.num_processes)

    norm = descend(optimizer, rate, options.clip, state.step, getattr(accelerator, "scaler", None))
    if learning:
        state.average.update_parameters(state.model)
    state.step += 1
    means = sum_counts(torch.stack(list(sums.values()))).tolist()
    report = dict(zip(sums, means, strict=True)) | {"grad_norm": norm, "lr": rate}
    return {prefix + name: value for name, value in report.items()}


@torch.no_grad()
def measure_scale(state: GenerationState, batches: Sequence[Batch]) -> float:
    """One over the standard deviation of the latents of a step's samples, over all ranks."""
    sums = torch.zeros(3, dtype=torch.float64, device=state.accelerator.device)
    for index, batch in enumerate(batches):
        posterior = state.model.tokenizer.autoencoder.posterior(batch.images.to(sums.device))
        values = posterior.sample(_latent_noise(_generators(state, index), posterior.mean)).double()
        sums += torch.stack([values.new_tensor(values.numel()), values.sum(), values.square().sum()])
    count, total, squares = sum_counts(sums).tolist()
    return ((squares - total**2 / count) / (count - 1)) ** -0.5


def _autoencoder_terms(
    state: GenerationState, x: Tensor, captions: Sequence[str], rows: Rows
) -> tuple[Tensor, dict[str, Tensor]]:
    """L1 of a decoded sample of the posterior, and the divergence per pixel value, in float32."""
    autoencoder = state.model.tokenizer.autoencoder
    posterior = autoencoder.posterior(x)
    pixel = (autoencoder.decode(posterior.sample(_latent_noise(rows, posterior.mean))) - x).abs().mean()
    divergence = posterior.kl().mean() / x[0].numel()
    return pixel + state.config.autoencoder.kl_weight * divergence, {"pixel": pixel, "divergence": divergence}


def _mar_terms(
    state: GenerationState, x: Tensor, captions: Sequence[str], rows: Rows
) -> tuple[Tensor, dict[str, Tensor]]:
    """MAR's two terms on frozen latents, some captions dropped; as many tokens are hidden in all rows of the step."""
    config, tokenizer = state.config, state.model.tokenizer
    noise = None
    if config.posterior:
        grid = tokenizer.grid(*x.shape[-2:])
        noise = _latent_noise(rows, x.new_empty(len(x), tokenizer.autoencoder.dim, *grid))
    with torch.no_grad():
        latents = tokenizer.encode_tensor(x, noise)
    kept = [
        "" if float(torch.rand((), generator=row)) < config.drop else caption
        for row, caption in zip(rows, captions, strict=True)
    ]
    draws = tokenizer.draw(len(x), latents.values.shape[1], _generator(state), rows)
    with state.accelerator.autocast():
        terms = tokenizer(latents.values, latents.grid, draws, state.model.condition(kept))
    return terms.noise + terms.bound, {"noise": terms.noise, "bound": terms.bound}


def _generators(state: GenerationState, index: int) -> Rows:
    """Of the rows of this rank's micro-batch; the networks' own chance (dropout) is seeded on the way."""
    accelerator, size = state.accelerator, state.config.batch_size
    first = (index * accelerator.num_processes + accelerator.process_index) * size
    torch.manual_seed(_generator(state, first).initial_seed())
    return [_generator(state, row) for row in range(first, first + size)]


def _generator(state: GenerationState, row: int = -1) -> torch.Generator:
    """Of a row of the step's batch, or of what is drawn once for all of them."""
    stage = int(state.stage == "mar")
    return torch.Generator().manual_seed(mix_seeds(state.config.seed, stage, state.within, row))


def _latent_noise(rows: Rows, like: Tensor) -> Tensor:
    """Standard normal, of the shape [B, D, h, w] and on the device of `like`."""
    return torch.stack([torch.randn(like.shape[1:], generator=row) for row in rows]).to(like.device)
