"""One training step, to be read aloud."""

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor

from tokenizers_mm.data.sources import Batch
from tokenizers_mm.decoders.pixel import PixelDecoder
from tokenizers_mm.eval.image import psnr
from tokenizers_mm.functional.adversarial import adaptive_weight, hinge_discriminator, logistic_discriminator
from tokenizers_mm.functional.noise import inject_noise
from tokenizers_mm.types import Quantized, Reconstruction

from .descent import descend
from .schedule import learning_rate
from .state import TrainState
from .weights import weighted_sum


def train_step(state: TrainState, batches: Sequence[Batch], progress: float) -> dict[str, float]:
    """One step of the tokenizer and one of the discriminator over the micro-batches; returns what to report.

    progress: share of the run that is done, in [0, 1), for the learning rate.
    """
    config, accelerator = state.config, state.accelerator
    rate = learning_rate(config.optimizer, state.step, progress)
    gan = state.discriminator is not None and state.step >= config.loss.gan_start
    disturbance, scaler = _disturbance(state), getattr(accelerator, "scaler", None)
    report: dict[str, float] = {}
    fakes: list[tuple[Tensor, Tensor]] = []
    quantized: dict[str, Quantized] = {}

    # The tokenizer: encode, quantize, decode; terms; their weighted sum; backward.
    for batch in batches:
        x = batch.images.to(accelerator.device)
        with accelerator.autocast():
            output = state.tokenizer(x, **disturbance)
            terms = tokenizer_terms(state, x, output, batch, gan)
            loss = weighted_sum(terms, config.loss.weights)
            accelerator.backward(loss / len(batches))
        quantized = dict(output.quantized)
        count_codes(state, quantized)
        fakes.append((x, output.image.detach()))
        add(report, terms | {"loss": loss, "psnr": psnr(output.image.detach().float(), x).mean()}, 1 / len(batches))

    report["grad_norm"] = descend(state.optimizer, rate, config.optimizer.clip, state.step, scaler)

    # The discriminator: real against reconstructed.
    if gan:
        own = config.discriminator_optimizer  # its schedule begins with its first step
        its_rate = learning_rate(own, state.step - config.loss.gan_start, progress) if own else rate
        report |= discriminator_step(state, fakes, its_rate, (own or config.optimizer).clip)

    # Upkeep: unused codes, the moving average, the count of steps.
    upkeep = config.upkeep
    if upkeep.every and (state.step + 1) % upkeep.every == 0 and progress < upkeep.until:
        report["revived"] = float(state.upkeep.after_step(quantized, state.generator))
    if state.ema is not None:
        state.ema.update_parameters(state.tokenizer)
    state.step += 1
    report["lr"] = rate
    return report


def tokenizer_terms(state: TrainState, x: Tensor, output: Reconstruction, batch: Batch, gan: bool) -> dict[str, Tensor]:
    """The terms of the tokenizer's loss, unweighted; `gan` adds the adversarial one."""
    terms = state.objective.terms(x, output, batch)
    if gan:
        terms["generator"] = _generator_term(state, output.image, terms)
    return terms


def discriminator_step(
    state: TrainState, pairs: Sequence[tuple[Tensor, Tensor]], rate: float, clip: float
) -> dict[str, float]:
    """One step of the discriminator on (real, reconstructed) images; returns what to report."""
    assert state.discriminator is not None
    assert state.discriminator_optimizer is not None
    loss_config, report = state.config.loss, {}
    discriminate = hinge_discriminator if loss_config.gan == "hinge" else logistic_discriminator
    for real, fake in pairs:
        with state.accelerator.autocast():
            real_logits, fake_logits = state.discriminator(real).float(), state.discriminator(fake).float()
            loss = loss_config.weights.generator * discriminate(real_logits, fake_logits)
            state.accelerator.backward(loss / len(pairs))
        add(report, {"discriminator": loss}, 1 / len(pairs))
    report["discriminator_grad_norm"] = descend(
        state.discriminator_optimizer, rate, clip, state.step, getattr(state.accelerator, "scaler", None)
    )
    return report


def _disturbance(state: TrainState) -> dict[str, Any]:
    """What makes training harder than use, as options of the forward pass: scale drop, wrong pixel codes."""
    keep, noise = _scales_to_keep(state), state.config.noise
    options: dict[str, Any] = {} if keep is None else {"keep": keep}
    if noise is not None:

        def perturb(vectors: Tensor) -> Tensor:
            u_sample = torch.rand(len(vectors), generator=state.generator).to(vectors.device)
            u_position = torch.rand(vectors.shape[:3], generator=state.generator).to(vectors.device)
            return inject_noise(vectors, u_sample, u_position, noise.sample_rate, noise.position_rate, noise.kind)

        options["perturb"] = perturb
    return options


def _scales_to_keep(state: TrainState) -> list[int] | None:
    """Scale drop: now and then all scales but one, which is never the first."""
    count = len(getattr(getattr(state.tokenizer, "quantizer", None), "grids", ()))
    if not state.config.scale_drop or count < 2:
        return None
    if float(torch.rand((), generator=state.generator)) >= state.config.scale_drop:
        return None
    dropped = 1 + int(torch.randint(count - 1, (), generator=state.generator))
    return [index for index in range(count) if index != dropped]


def _generator_term(state: TrainState, image: Tensor, terms: dict[str, Tensor]) -> Tensor:
    """The adversarial term; the discriminator collects no gradient from it."""
    assert state.discriminator is not None
    state.discriminator.requires_grad_(False)
    term = state.objective.adversarial(state.discriminator(image))
    state.discriminator.requires_grad_(True)
    if not state.config.loss.adaptive:
        return term
    visible = {name: terms[name] for name in ("pixel", "perceptual") if name in terms}
    reconstruction = weighted_sum(visible, state.config.loss.weights)
    return term * adaptive_weight(reconstruction, term, cast(PixelDecoder, state.tokenizer.pixel_decoder).last_layer)


def count_codes(state: TrainState, quantized: dict[str, Quantized]) -> None:
    """Add to the counts of codes since the last report."""
    for name, counts in state.upkeep.count(quantized).items():
        known = state.counts.get(name)
        state.counts[name] = counts if known is None else known + counts


def add(report: dict[str, float], values: dict[str, Tensor], share: float) -> None:
    """Add a share of each value to the report."""
    for name, value in values.items():
        report[name] = report.get(name, 0.0) + float(value.detach()) * share
