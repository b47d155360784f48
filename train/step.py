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
from tokenizers_mm.types import Quantized

from .optimize import optimizer_step
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
    disturbance = _disturbance(state)
    report: dict[str, float] = {}
    fakes: list[tuple[Tensor, Tensor]] = []
    quantized: dict[str, Quantized] = {}

    # The tokenizer: encode, quantize, decode; terms; their weighted sum; backward.
    for batch in batches:
        x = batch.images.to(accelerator.device)
        with accelerator.autocast():
            output = state.tokenizer(x, **disturbance)
            terms = state.objective.terms(x, output, batch)
            if gan:
                terms["generator"] = _generator_term(state, output.image, terms)
            loss = weighted_sum(terms, config.loss.weights)
            accelerator.backward(loss / len(batches))
        quantized = dict(output.quantized)
        _count(state, quantized)
        fakes.append((x, output.image.detach()))
        _add(report, terms | {"loss": loss, "psnr": psnr(output.image.detach().float(), x).mean()}, 1 / len(batches))

    report["grad_norm"] = optimizer_step(accelerator, state.optimizer, rate, config.optimizer.clip, state.step)

    # The discriminator: real against reconstructed.
    if gan and state.discriminator is not None and state.discriminator_optimizer is not None:
        discriminate = hinge_discriminator if config.loss.gan == "hinge" else logistic_discriminator
        for real, fake in fakes:
            with accelerator.autocast():
                real_logits, fake_logits = state.discriminator(real).float(), state.discriminator(fake).float()
                loss = config.loss.weights.generator * discriminate(real_logits, fake_logits)
                accelerator.backward(loss / len(fakes))
            _add(report, {"discriminator": loss}, 1 / len(fakes))
        own = config.discriminator_optimizer  # its schedule begins with its first step
        its_rate = learning_rate(own, state.step - config.loss.gan_start, progress) if own else rate
        its_clip = (own or config.optimizer).clip
        report["discriminator_grad_norm"] = optimizer_step(
            accelerator, state.discriminator_optimizer, its_rate, its_clip, state.step
        )

    # Upkeep: unused codes, the moving average, the count of steps.
    upkeep = config.upkeep
    if upkeep.every and (state.step + 1) % upkeep.every == 0 and progress < upkeep.until:
        report["revived"] = float(state.upkeep.after_step(quantized, state.generator))
    if state.ema is not None:
        state.ema.update_parameters(state.tokenizer)
    state.step += 1
    report["lr"] = rate
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


def _count(state: TrainState, quantized: dict[str, Quantized]) -> None:
    """Add to the counts of codes since the last report."""
    for name, counts in state.upkeep.count(quantized).items():
        known = state.counts.get(name)
        state.counts[name] = counts if known is None else known + counts


def _add(report: dict[str, float], values: dict[str, Tensor], share: float) -> None:
    for name, value in values.items():
        report[name] = report.get(name, 0.0) + float(value.detach()) * share
