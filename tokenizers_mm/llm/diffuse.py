"""Images by masked diffusion with a language model that sees both ways (MMaDA, Show-o): objective and decoding.

The sequences are those of next-token training; hidden tokens are replaced by a mask token and predicted in their own
places.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tokenizers_mm._check import require
from tokenizers_mm.functional.masked_diffusion import (
    Generators,
    cosine_ratio,
    hide,
    left_hidden,
    masked_diffusion_loss,
    uniform,
)
from tokenizers_mm.functional.sampling import draw, guide_logits
from tokenizers_mm.llm.batch import IGNORED, Batch
from tokenizers_mm.llm.loss import logits_at
from tokenizers_mm.llm.packing import block_mask
from tokenizers_mm.llm.vocabulary import VisualVocabulary


def diffusion_loss(model: Any, batch: Batch, mask_id: int, generator: Generators = None) -> Tensor:
    """Hide a share (cosine of a random time) of the tokens that have labels, and predict them.

    batch: padded or packed rows (packed with causal=False). Tokens without labels are always visible.
    """
    maskable = batch.labels != IGNORED
    time = uniform(len(batch), 1, generator)[:, 0].to(maskable.device)
    hidden = hide(maskable, cosine_ratio(time), generator)
    tokens = batch.input_ids.masked_fill(hidden, mask_id)
    logits = logits_at(model, _inputs(batch, tokens), hidden)
    return masked_diffusion_loss(logits, batch.input_ids, hidden, maskable)


def see_both_ways(batch: Batch) -> Tensor:
    """The mask [B, 1, L, L] with which every token sees its whole row."""
    if batch.attention_mask.ndim == 4:
        return batch.attention_mask
    return block_mask(torch.where(batch.attention_mask > 0, 0, -1), causal=False)


@dataclass(frozen=True)
class DiffusionSettings:
    """steps: of decoding. temperature: of the choice of what to reveal, falling to 0. guidance: 1 for none."""

    steps: int = 16
    temperature: float = 1.0
    guidance: float = 1.0


@torch.no_grad()
def diffuse(
    model: Any,
    vocabulary: VisualVocabulary,
    batch: Batch,
    mask_id: int,
    settings: DiffusionSettings | None = None,
    *,
    unconditional: Batch | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Fill the codes of all images in the rows: input ids int64 [B, L] with every code drawn anew.

    batch: rows with an image each (any codes: they are hidden first) and as many codes. Markers stand
    as they are, and each place takes only codes of its own stream. unconditional: the same images after empty prompts.
    """
    settings = settings or DiffusionSettings()
    places = batch.places[..., 0]
    counts = {int(count) for count in (places >= 0).sum(1)}
    require(len(counts) == 1 and 0 not in counts, "batch", "as many codes in each row, at least one", sorted(counts))
    require(settings.guidance == 1 or unconditional is not None, "unconditional", "rows for guidance", "None")
    slots, total = (places >= 0).nonzero()[:, 1].view(len(batch), -1), counts.pop()
    stream = places.gather(1, slots)
    known = torch.full_like(slots, -1)
    for step in range(settings.steps):
        logits = _logits(model, batch, slots, known, mask_id)
        if settings.guidance != 1 and unconditional is not None:
            other = (unconditional.places[..., 0] >= 0).nonzero()[:, 1].view(len(batch), -1)
            logits = guide_logits(logits, _logits(model, unconditional, other, known, mask_id), settings.guidance)
        drawn, confidence = _draw(logits, stream, vocabulary, generator)
        hidden = known < 0
        drawn = torch.where(hidden, drawn, known)
        fade = settings.temperature * (1 - (step + 1) / settings.steps)
        noise = -torch.log(-torch.log(torch.rand(drawn.shape, generator=generator).clamp(1e-9, 1 - 1e-7)))
        score = (confidence + fade * noise.to(drawn.device)).masked_fill(~hidden, torch.inf)
        again = score.argsort(1)[:, : left_hidden(total, step, settings.steps)]
        known = drawn.scatter(1, again, -1)
    return batch.input_ids.scatter(1, slots, known)


def _logits(model: Any, batch: Batch, slots: Tensor, known: Tensor, mask_id: int) -> Tensor:
    """Logits [B, n, V] at the slots, where hidden ones hold the mask token."""
    tokens = batch.input_ids.scatter(1, slots, torch.where(known < 0, mask_id, known))
    where = torch.zeros_like(tokens, dtype=torch.bool).scatter(1, slots, True)
    return logits_at(model, _inputs(batch, tokens), where).unflatten(0, slots.shape).float()


def _inputs(batch: Batch, tokens: Tensor) -> dict[str, Tensor]:
    """Inputs of the model when it sees both ways."""
    return {"input_ids": tokens, "attention_mask": see_both_ways(batch), "position_ids": batch.position_ids}


def _draw(
    logits: Tensor, stream: Tensor, vocabulary: VisualVocabulary, generator: torch.Generator | None
) -> tuple[Tensor, Tensor]:
    """Tokens int64 [B, n], each from its stream's range, and the logarithm of their probabilities."""
    drawn, confidence = torch.zeros_like(stream), torch.zeros(stream.shape, device=stream.device)
    for index, code in enumerate(vocabulary.codes):
        own = stream == index
        if not bool(own.any()):
            continue
        log_p = logits[own][:, code.start : code.start + code.size].log_softmax(-1)
        found = draw(log_p.exp(), generator)[:, None]
        drawn[own], confidence[own] = found[:, 0] + code.start, log_p.gather(1, found)[:, 0]
    return drawn, confidence
