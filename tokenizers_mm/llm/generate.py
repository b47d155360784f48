"""Text and images from a language model, each sequence within the grammar.

An own loop on top of any causal language model of `transformers`: one cache, guidance with its own rows in it, sampling
that may differ by stream, and a callback that sees images grow. The grammar also works in `model.generate` (see
`grammar.GrammarProcessor`).
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from tokenizers_mm._check import require
from tokenizers_mm.functional.sampling import guide_logits, sample_logits
from tokenizers_mm.llm.batch import Batch
from tokenizers_mm.llm.grammar import IMAGE, MARKER, NOTHING, ROW, SCALE, TEXT, Grammar
from tokenizers_mm.llm.layout import ImagePlan
from tokenizers_mm.llm.model import check_rows
from tokenizers_mm.llm.positions import next_position, position_ids
from tokenizers_mm.llm.projector import FeatureProjector, embed
from tokenizers_mm.llm.transformers_api import cache_of, embeddings, end_tokens, forward, takes
from tokenizers_mm.models.base import ImageTokenizer
from tokenizers_mm.types import ImageCodes

EVENTS: dict[int, Literal["row", "scale", "image"]] = {ROW: "row", SCALE: "scale", IMAGE: "image"}


@dataclass(frozen=True)
class Sampling:
    """Rule by which a token is drawn.

    temperature: 0 or more; 0 takes the most likely token. top_k: tokens that are kept, 0 for all. top_p: share of the
    probability that is kept, over 0 and up to 1. Others are a ValueError.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0

    def __post_init__(self) -> None:
        require(self.temperature >= 0, "temperature", "0 or more", self.temperature)
        require(self.top_k >= 0, "top_k", "0 or more", self.top_k)
        require(0 < self.top_p <= 1, "top_p", "over 0 and up to 1", self.top_p)


@dataclass(frozen=True)
class GenerationSettings:
    """Settings of generation.

    sampling: for text. streams: by name of a stream, where its codes are drawn otherwise. guidance: the scale of
    classifier-free guidance (1: none); it needs unconditional prompts. max_new_tokens: where to stop at the latest; an
    image that began is always finished. progress: show a bar of tqdm.
    """

    max_new_tokens: int = 4096
    sampling: Sampling = field(default_factory=Sampling)
    streams: Mapping[str, Sampling] = field(default_factory=dict)
    guidance: float = 1.0
    progress: bool = False


@dataclass(frozen=True)
class PartialImage:
    """An image that grows: the codes so far, int64 [L], and which of them are known, bool [L].

    row: the sequence. event: what has just been finished.
    """

    row: int
    event: Literal["row", "scale", "image"]
    codes: ImageCodes
    known: Tensor


@torch.no_grad()
def generate(
    model: Any,
    prompts: Batch,
    grammar: Grammar,
    settings: GenerationSettings | None = None,
    *,
    unconditional: Batch | None = None,
    generator: torch.Generator | None = None,
    projector: FeatureProjector | None = None,
    on_image: Callable[[PartialImage], None] | None = None,
) -> Tensor:
    """New tokens int64 [B, T] after prompts that are padded on the left; finished rows are filled with the end token.

    A row ends with an end token of the grammar; where it has any, with each that the model's generation settings name.
    unconditional: prompts of the same number of rows for guidance. projector: for images that prompts show as features.
    on_image: called when a row, a scale or an image is finished.

    Raises: ValueError for a model in training mode or without rows for the vocabulary, prompts that are padded on the
    right, guidance without unconditional prompts, features without a projector, and settings of unknown streams.
    """
    settings = settings or GenerationSettings()
    check_rows(model, grammar.vocabulary)
    require(not model.training, "model", "evaluation mode (model.eval())", "training mode")
    unknown = sorted(set(settings.streams) - {code.stream for code in grammar.vocabulary.codes})
    require(not unknown, "streams", f"names among {[code.stream for code in grammar.vocabulary.codes]}", unknown)
    guided = settings.guidance != 1.0
    require(not guided or unconditional is not None, "unconditional", "prompts for guidance", "None")
    for batch in (prompts, unconditional):
        if batch is not None:
            require(bool(batch.attention_mask[:, -1].all()), "prompts", "padding on the left", "padding on the right")
            require(len(batch) == len(prompts), "unconditional", f"{len(prompts)} rows", len(batch))
            shown = not batch.features or projector is not None
            require(shown, "prompts", "images as ids, or a projector", "images as features")
    device = embeddings(model).weight.device
    branches = [prompts, unconditional] if guided and unconditional is not None else [prompts]
    counts = {branch.longest_image for branch in branches}
    require(len(counts) == 1, "unconditional", "rows of the same processor", "positions that are counted otherwise")
    longest = counts.pop()
    telling = longest is None or grammar.tells_images
    require(telling, "positions", "'order' where images begin with plain text that the model may also say", "'slots'")
    branches = [branch.to(device) for branch in branches]
    decoder = _Decoder(model, *_stack(branches), longest)
    if projector is not None:
        decoder.embedded = pad_left([embed(model, branch, projector)["inputs_embeds"] for branch in branches])
    state = grammar.read(prompts.input_ids.to(device))
    ends = torch.tensor(_ends(model, grammar), dtype=torch.int64, device=device)
    fill = grammar.eos if grammar.eos is not None else 0
    finished = torch.zeros(len(prompts), dtype=torch.bool, device=device)
    history, new = prompts.input_ids.to(device), []
    limit, bar = settings.max_new_tokens, _bar(settings)
    while len(new) < limit or bool((~finished).any()):
        logits = decoder.logits().float()
        if guided:
            logits = guide_logits(*logits.chunk(2), settings.guidance)
        tokens = _draw(grammar.mask(state, logits), grammar.kind(state), grammar, settings, generator)
        tokens = torch.where(finished, fill, tokens)
        new.append(tokens)
        if on_image is not None:
            history = torch.cat([history, tokens[:, None]], 1)
            _report(grammar, state, history, finished, on_image)
        slots = grammar.slot(state, tokens)
        state = grammar.advance(state, tokens)
        finished |= torch.isin(tokens, ends)
        if len(new) >= limit:
            finished |= grammar.kind(state) == TEXT
        bar.update(1)
        if bool(finished.all()):
            break
        decoder.append(tokens.repeat(len(branches)), slots.repeat(len(branches)))
    bar.close()
    return torch.stack(new, 1) if new else history[:, :0]


def _ends(model: Any, grammar: Grammar) -> list[int]:
    """Tokens that end a row."""
    if not grammar.ends:
        return []
    named = torch.tensor(end_tokens(model), dtype=torch.int64)
    known = (named >= 0) & (named < grammar.vocabulary.size) & ~grammar.vocabulary.is_visual(named)
    return sorted({*grammar.ends, *named[known].tolist()})


def preview(tokenizer: ImageTokenizer, partial: PartialImage) -> Tensor:
    """A growing image as pixels [1, 3, H, W]; in a scale that has begun, missing codes are the last that is there."""
    ids, known = partial.codes.ids[0], partial.known
    streams, start, end = partial.codes.streams, 0, 0
    for stream in streams:
        for rows, columns in stream.grids:
            block = slice(start, start + rows * columns)
            start = block.stop
            if not bool(known[block].any()):
                continue
            end = start
            last = ids[block][known[block]][-1]
            ids = ids.clone()
            ids[block] = torch.where(known[block], ids[block], last)
    first = sum(stream.num_ids for stream in streams[:-1]) + streams[-1].grids[0][0] * streams[-1].grids[0][1]
    codes = ImageCodes(ids[None, : max(first, end)], partial.codes.height, partial.codes.width, streams)
    return tokenizer.decode(codes.to(tokenizer.device))


class _Decoder:
    """A model, its cache, and the tokens it has not read yet."""

    def __init__(self, model: Any, tokens: Tensor, mask: Tensor, positions: Tensor, longest_image: int | None) -> None:
        self.model, self.mask, self.cache = model, mask, None
        self.tokens, self.positions, self.longest_image = tokens, positions, longest_image
        self.next = next_position(positions, mask, longest_image)
        self.embedded: Tensor | None = None  # what stands in place of the tokens, features among it
        self.options: dict[str, Any] = {"logits_to_keep": 1} if takes(model, "logits_to_keep") else {}

    def logits(self) -> Tensor:
        """Logits [B, V] of the next token."""
        inputs = {"attention_mask": self.mask, "position_ids": self.positions}
        inputs |= {"input_ids": self.tokens} if self.embedded is None else {"inputs_embeds": self.embedded}
        out = forward(self.model, {**inputs, **self.options}, cache=self.cache, use_cache=True)
        self.cache = cache_of(out)
        return out.logits[:, -1]

    def append(self, tokens: Tensor, slots: Tensor) -> None:
        """The next token of each row and its slot in an image (-1 for text), both int64 [B]."""
        self.tokens, self.embedded = tokens[:, None], None
        self.positions = position_ids(slots[:, None], self.next, self.longest_image)
        self.next = torch.maximum(self.next, self.positions + 1)
        self.mask = F.pad(self.mask, (0, 1), value=1)


class _NoBar:
    def update(self, count: int) -> None: ...

    def close(self) -> None: ...


def _bar(settings: GenerationSettings) -> Any:
    if not settings.progress:
        return _NoBar()
    from tqdm.auto import tqdm  # only when asked for

    return tqdm(total=settings.max_new_tokens, unit="token")


def _stack(batches: list[Batch]) -> tuple[Tensor, Tensor, Tensor]:
    """The tokens, masks and positions of batches padded on the left, as one."""
    return (
        pad_left([batch.input_ids for batch in batches]),
        pad_left([batch.attention_mask for batch in batches]),
        pad_left([batch.position_ids for batch in batches]),
    )


def pad_left(tensors: list[Tensor]) -> Tensor:
    """Tensors [B, L, ...] of several lengths as one, with zeros at the left."""
    longest = max(tensor.shape[1] for tensor in tensors)
    fill = [(0, 0) * (tensor.ndim - 2) + (longest - tensor.shape[1], 0) for tensor in tensors]
    return torch.cat([F.pad(tensor, sides) for tensor, sides in zip(tensors, fill, strict=True)])


def _draw(
    scores: Tensor, kind: Tensor, grammar: Grammar, settings: GenerationSettings, generator: torch.Generator | None
) -> Tensor:
    """One token per row, int64 [B]; rows whose next tokens are drawn alike go together."""
    names = {index: code.stream for index, code in enumerate(grammar.vocabulary.codes)}
    kinds = kind.tolist()
    wanted = [settings.streams.get(names.get(k, ""), settings.sampling) for k in kinds]
    greedy = any(k == MARKER or s.temperature == 0 for k, s in zip(kinds, wanted, strict=True))
    tokens = scores.argmax(-1) if greedy else torch.zeros_like(kind)
    for sampling in dict.fromkeys(wanted):
        rows = [row for row, (k, s) in enumerate(zip(kinds, wanted, strict=True)) if s == sampling and k != MARKER]
        if not rows or sampling.temperature == 0:
            continue
        part = scores if len(rows) == len(kinds) else scores[rows]
        tokens[rows] = sample_logits(part, sampling.temperature, sampling.top_k, sampling.top_p, generator)
    return tokens


def _report(
    grammar: Grammar,
    state: Tensor,
    history: Tensor,
    finished: Tensor,
    on_image: Callable[[PartialImage], None],
) -> None:
    """Tell of every row, scale or image that the last tokens have finished."""
    for row, event in enumerate(grammar.event(state).tolist()):
        place = None if event == NOTHING or bool(finished[row]) else grammar.place(int(state[row]))
        if place is not None:
            on_image(_partial(*place, history[row], row, EVENTS[event]))


def _partial(
    plan: ImagePlan, slot: int, history: Tensor, row: int, event: Literal["row", "scale", "image"]
) -> PartialImage:
    known = plan.code_slots <= slot
    body = history[-(slot + 1) :].cpu() if slot < len(history) else history.cpu()
    tokens = F.pad(body, (slot + 1 - len(body), plan.length - slot - 1))
    ids = torch.where(known, tokens[plan.code_slots] - plan.low[plan.code_slots], 0)
    return PartialImage(row, event, ImageCodes(ids[None], plan.height, plan.width, plan.streams), known)
