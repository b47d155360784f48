"""Images by next-scale prediction inside any causal decoder (VAR, arXiv 2404.02905; TokenFlow, arXiv 2412.03069).

A sequence is P text tokens, then the L ids of one image, coarse to fine and row-major, then the rest of the text. Id j
is predicted at position P - 1 + j; those positions are the image's inputs: at P - 1 the last token of the text, and for
every later scale the features of all scales before it. Inside a scale everything sees everything; all ids of a scale
are sampled at once.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tokenizers_mm._check import require
from tokenizers_mm.functional import sampling as choice
from tokenizers_mm.functional.multiscale import Grid, bicubic_up
from tokenizers_mm.llm.loss import logits_at
from tokenizers_mm.llm.positions import counted
from tokenizers_mm.llm.transformers_api import cache_of, embeddings, forward, keep_for_rewind, rewind

IGNORE = -100
"""Label of positions without loss, as transformers has it."""


def scale_bounds(grids: Sequence[Grid]) -> list[tuple[int, int]]:
    """First and past-the-last index of every scale among the L ids."""
    bounds, start = [], 0
    for rows, columns in grids:
        bounds.append((start, start + rows * columns))
        start += rows * columns
    return bounds


def next_scale_features(vectors: Tensor, grids: Sequence[Grid], residual: bool = False) -> Tensor:
    """Inputs of scales 2 to n + 1 (of those there are), [B, m, D], from the code vectors [B, L', D] of n whole scales.

    The sum of the codes is carried from scale to scale: what was summed up is resized to the next grid, is the input
    there, and the codes of that scale are added to it. (Not the sum of full-size codes that the decoder reads.)
    residual: nothing is summed up, the input of a scale is the codes of the scale before it alone, resized; for ids
    with mistakes (`MultiScaleQuantizer.self_correcting`; NextFlow, arXiv 2601.02204).
    """
    parts, carried = [], None
    for index, (start, end) in enumerate(scale_bounds(grids)):
        if carried is not None:
            parts.append(carried.flatten(1, 2))
        if start == vectors.shape[1] or index + 1 == len(grids):
            break
        require(end <= vectors.shape[1], "vectors", "a whole number of scales", vectors)
        carried = carry(
            None if residual else carried, vectors[:, start:end].unflatten(1, grids[index]), grids[index + 1]
        )
    return torch.cat(parts, dim=1)


def carry(carried: Tensor | None, codes: Tensor, grid: Grid) -> Tensor:
    """Add the codes [B, r, c, D] of a scale to what was carried to it, and resize the sum to the next grid."""
    return bicubic_up(codes if carried is None else carried + codes, grid)


def scale_weights(grids: Sequence[Grid], power: float) -> Tensor:
    """Weight of each of the L ids in a loss: its scale's number of ids to the power of -`power`, with mean 1.

    0 weighs ids alike, 1 scales alike. Source: NextFlow (arXiv 2601.02204), scale reweighting.
    """
    sizes = torch.tensor([rows * columns for rows, columns in grids])
    weights = (sizes.double() ** -power).repeat_interleave(sizes)
    return (weights / weights.mean()).float()


def block_mask(valid: Tensor, prefix: int, grids: Sequence[Grid]) -> Tensor:
    """True where a query may look, [B, 1, T, T]: causal, but inside the image also forward within the own scale.

    valid: bool [B, T], False at padding, which nobody sees. prefix: P, the number of text tokens before the image.
    """
    count = valid.shape[1]
    allowed = torch.ones(count, count, dtype=torch.bool, device=valid.device).tril()
    for start, end in scale_bounds(grids):
        place = slice(prefix - 1 + start, prefix - 1 + end)
        allowed[place, place] = True
    return allowed[None, None] & valid[:, None, None, :]


def additive_mask(allowed: Tensor, dtype: torch.dtype) -> Tensor:
    """0 where `allowed`, else the least finite number: rows without any key stay finite."""
    return torch.zeros(allowed.shape, dtype=dtype, device=allowed.device).masked_fill(~allowed, torch.finfo(dtype).min)


def image_labels(input_ids: Tensor, prefix: int) -> Tensor:
    """Labels for transformers' shifted loss: the image and what follows it, nothing for the text before."""
    labels = input_ids.clone()
    labels[:, :prefix] = IGNORE
    return labels


class NextScaleInputs(nn.Module):
    """Input embeddings of such sequences: a projector for the features, and embeddings of scale and place.

    `levels` has one row for text and one per scale (row i for scale i, counted from 1; the input of scale 1 is text);
    `positions` has one row per id and is added at the L positions that predict an id. longest_prompt: None counts
    position ids from a prompt's first token; a number of tokens counts them so that images begin at the same position
    after prompts of all lengths up to this one, for decoders with learned positions. residual: see
    `next_scale_features`.
    """

    def __init__(
        self,
        grids: Sequence[Grid],
        feature_dim: int,
        width: int,
        longest_prompt: int | None = None,
        residual: bool = False,
    ) -> None:
        super().__init__()
        self.longest_prompt, self.residual = longest_prompt, residual
        require(len(grids) > 0 and tuple(grids[0]) == (1, 1), "grids", "a first grid of (1, 1)", list(grids)[:1])
        self.grids = tuple(grids)
        self.bounds = scale_bounds(grids)
        self.length = self.bounds[-1][1]
        self.project = nn.Sequential(nn.Linear(feature_dim, width), nn.GELU(), nn.Linear(width, width))
        self.levels = nn.Embedding(len(grids) + 1, width)
        self.positions = nn.Parameter(torch.zeros(self.length, width))
        nn.init.trunc_normal_(self.levels.weight, std=0.02)
        nn.init.trunc_normal_(self.positions, std=0.02)

    def position_ids(self, valid: Tensor, prefix: int) -> Tensor:
        """Position ids int64 [B, T] of prompts of `prefix` tokens and the image after them.

        valid: bool [B, T], False at (left) padding, which changes no position of a token.
        """
        if self.longest_prompt is None:
            return counted(valid)
        longest = int(valid[:, :prefix].sum(1).max())
        require(longest <= self.longest_prompt, "prompt", f"at most {self.longest_prompt} tokens", f"{longest}")
        order = torch.arange(valid.shape[1], device=valid.device) + self.longest_prompt - prefix
        return order.clamp_min(0).expand(len(valid), -1)

    def prompt(self, text: Tensor) -> Tensor:
        """Embeddings [B, P, W] of the text before an image; its last position predicts scale 1."""
        text = text + self.levels.weight[0]
        return torch.cat([text[:, :-1], text[:, -1:] + self.positions[0]], dim=1)

    def block(self, features: Tensor, scale: int) -> Tensor:
        """Embeddings [B, n, W] of the features [B, n, D] of one scale, counted from 0, at least 1."""
        start, end = self.bounds[scale]
        require(scale > 0 and features.shape[1] == end - start, "features", f"{end - start} of scale {scale}", features)
        return self.project(features) + self.levels.weight[scale + 1] + self.positions[start:end]

    def forward(self, text: Tensor, features: Tensor, prefix: int) -> Tensor:
        """Embeddings [B, T, W] of a whole training sequence.

        text [B, T, W] are the decoder's own embeddings; those of the ids are not used. features [B, L - 1, D] come from
        `next_scale_features`. The last id is the input of no scale: its position holds the text's level alone.
        """
        first, last = self.bounds[0][1], self.length
        require(features.shape[1] == last - first, "features", f"[B, {last - first}, D]", features)
        blocks = [self.block(features[:, a - first : b - first], k) for k, (a, b) in enumerate(self.bounds) if k > 0]
        level = self.levels.weight[0]
        end = level.expand(text.shape[0], 1, -1)
        after = text[:, prefix + last :] + level
        return torch.cat([self.prompt(text[:, :prefix]), *blocks, end, after], dim=1)


def next_scale_loss(
    model: Any,
    inputs: NextScaleInputs,
    prompt: tuple[Tensor, Tensor],
    ids: Tensor,
    vectors: Tensor,
    first_id: int,
    scale_power: float = 0.0,
) -> Tensor:
    """Mean cross-entropy of the ids [B, L] of images, each predicted from the prompt and the scales before its own.

    prompt: token ids int64 [B, P] and a mask [B, P], False at (left) padding. vectors: of the ids (with self-correction
    of the ids that are read), [B, L, D], unsummed. first_id: where the codes begin in the vocabulary. scale_power: of
    `scale_weights`. The prompt itself is not learned.
    """
    tokens, valid = prompt
    count, prefix = ids.shape[1], tokens.shape[1]
    features = next_scale_features(vectors, inputs.grids, inputs.residual)
    embeds = inputs(embeddings(model)(tokens), features, prefix)
    valid = torch.cat([valid.bool(), valid.new_ones(ids.shape, dtype=torch.bool)], dim=1)
    where = torch.zeros_like(valid)
    where[:, prefix - 1 : prefix - 1 + count] = True
    given = {
        "inputs_embeds": embeds,
        "attention_mask": additive_mask(block_mask(valid, prefix, inputs.grids), embeds.dtype),
        "position_ids": inputs.position_ids(valid, prefix),
    }
    losses = F.cross_entropy(logits_at(model, given, where).float(), (first_id + ids).flatten(), reduction="none")
    if scale_power:
        losses = losses.view_as(ids) * scale_weights(inputs.grids, scale_power).to(losses.device)
    return losses.mean()


@dataclass(frozen=True)
class ScaleSampling:
    """Settings for drawing the ids of a scale.

    steps: (top_k, top_p) of each pass over a scale; from the second pass on the decoder reads the scale with the ids
    just drawn and draws them again. top_k 0 and top_p 0 switch a filter off. guidance: of the last scale; it grows
    linearly from 0 at the first. 0 needs no negative prompt. The paper's best: ((1200, 0.8), (100, 0.8), (1, 0)).
    """

    steps: tuple[tuple[int, float], ...] = ((600, 0.6),)
    guidance: float = 7.5


def guided(logits: Tensor, weight: float) -> Tensor:
    """Classifier-free guidance: (1 + weight) * conditional - weight * unconditional, the two halves of the batch."""
    conditional, unconditional = logits.chunk(2)
    return (1 + weight) * conditional - weight * unconditional


def filter_logits(logits: Tensor, top_k: int, top_p: float) -> Tensor:
    """Logits [..., K] with -inf outside the top_k largest, and then outside the smallest set of probability top_p.

    0 switches a filter off, as in the original's lists of sampling steps; one id always stays.
    """
    rows = logits.flatten(0, -2)
    values, index = choice.filter_logits(rows, 1.0, top_k, top_p or 1.0)
    if index is None:
        return logits
    return torch.full_like(rows, -torch.inf).scatter(-1, index, values).view_as(logits)


@dataclass(frozen=True)
class NextScaleGenerator:
    """Draws images with a decoder, its keys and values cached: every scale is computed once per pass.

    model: a transformers causal LM that takes `inputs_embeds`, a 4-D mask and a cache. look_up: code ids int64 [B, n]
    to vectors [B, n, D], unsummed. first_id: where the codes begin in the vocabulary. num_codes: how many there are.
    """

    model: Any
    inputs: NextScaleInputs
    look_up: Callable[[Tensor], Tensor]
    first_id: int
    num_codes: int

    @torch.no_grad()
    def __call__(
        self,
        prompt: tuple[Tensor, Tensor],
        negative: tuple[Tensor, Tensor] | None = None,
        sampling: ScaleSampling | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Code ids int64 [B, L] for prompts of one length.

        prompt and negative: token ids int64 [B, P] and a mask [B, P], False at (left) padding; the negative prompt is
        needed with guidance.
        """
        sampling = sampling or ScaleSampling()
        require(len(sampling.steps) > 0, "sampling.steps", "at least one (top_k, top_p)", "none")
        guide = sampling.guidance != 0
        require(not guide or negative is not None, "negative", "token ids and mask, for guidance", negative)
        ids, valid = prompt if negative is None or not guide else _both(prompt, negative)
        embeds = self.inputs.prompt(embeddings(self.model)(ids))
        whole = torch.cat([valid.bool(), valid.new_ones(len(valid), self.inputs.length, dtype=torch.bool)], dim=1)
        run = _CachedRun(self.model, valid.bool(), self.inputs.position_ids(whole, valid.shape[1]))
        grids, carried, drawn = self.inputs.grids, None, []
        for scale, grid in enumerate(grids):
            if carried is not None:
                embeds = self._block(carried, scale, guide)
            weight = sampling.guidance * scale / max(1, len(grids) - 1)
            for step, (top_k, top_p) in enumerate(sampling.steps if carried is not None else sampling.steps[:1]):
                if carried is not None and step > 0:
                    embeds = self._block(carried + codes, scale, guide)
                logits = run(embeds, again=step > 0)[:, -grid[0] * grid[1] :]
                logits = logits[..., self.first_id : self.first_id + self.num_codes].float()
                logits = guided(logits, weight) if guide else logits
                chosen = _draw(filter_logits(logits, top_k, top_p), generator)
                codes = self.look_up(chosen).unflatten(1, grid)
            drawn.append(chosen)
            if scale + 1 < len(grids):
                carried = carry(None if self.inputs.residual else carried, codes, grids[scale + 1])
        return torch.cat(drawn, dim=1)

    def _block(self, features: Tensor, scale: int, guide: bool) -> Tensor:
        """Embeddings of features [B, r, c, D] of a scale, once for each half of the batch."""
        embeds = self.inputs.block(features.flatten(1, 2), scale)
        return torch.cat([embeds, embeds]) if guide else embeds


class _CachedRun:
    """A decoder that is fed block by block; a block sees all before it and itself, the prompt is causal."""

    def __init__(self, model: Any, valid: Tensor, positions: Tensor) -> None:
        self.model, self.valid, self.positions = model, valid, positions
        self.cache: Any = None
        self.start = self.end = 0  # of the block read last

    def __call__(self, embeds: Tensor, again: bool) -> Tensor:
        """Logits of the next block; `again` reads the last one with other inputs, and forgets them afterwards.

        What later blocks see of a block is what its first reading left, as the original, which has no cache, has it.
        """
        count = embeds.shape[1]
        if not again:
            self.start, self.end = self.end, self.end + count
        if self.cache is None:
            allowed = block_mask(self.valid, count, [(1, 1)])
        else:
            others = self.valid.new_ones(len(self.valid), self.end - self.valid.shape[1])
            keys = torch.cat([self.valid, others], dim=1)
            if again:
                keys = torch.cat([keys, keys[:, self.start :]], dim=1)
                keys[:, self.start : self.end] = False
            allowed = keys[:, None, None, :].expand(-1, 1, count, -1)
        inputs = {
            "inputs_embeds": embeds,
            "attention_mask": additive_mask(allowed, embeds.dtype),
            "position_ids": self.positions[:, self.start : self.end],
        }
        cache = keep_for_rewind(self.cache) if again else self.cache
        out = forward(self.model, inputs, cache=cache, use_cache=True)
        self.cache = cache_of(out)
        if again:
            rewind(self.cache, count)
        return out.logits


def _both(prompt: tuple[Tensor, Tensor], negative: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    require(prompt[0].shape == negative[0].shape, "negative", f"ids {list(prompt[0].shape)}", negative[0])
    return torch.cat([prompt[0], negative[0]]), torch.cat([prompt[1], negative[1]])


def _draw(logits: Tensor, generator: torch.Generator | None) -> Tensor:
    """One id per position, [B, n], from logits [B, n, K]."""
    return choice.draw(logits.softmax(-1).flatten(0, 1), generator).view(logits.shape[:2])
