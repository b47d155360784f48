"""Grammar of the tokens that may come next: a plain state machine over tokens, batched, for any layout.

A state is one integer per sequence. Free text, the choice of an image size, and every slot of every image are states;
the next state is read from a table by the state and, where a choice was open, by the kind of the token. What a state
allows is one row of a table of booleans. So a step costs a few look-ups and one masked write, whatever the codebook.
"""

import bisect
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from tokenizers_mm._check import fail, require
from tokenizers_mm.llm.ids import as_ids
from tokenizers_mm.llm.layout import ImagePlan
from tokenizers_mm.llm.vocabulary import VisualVocabulary

Mode = Literal["free", "text", "image"]
"""After the prompt: text and images as the model likes, text only, or one image and then the end."""

Ranges = tuple[tuple[int, int], ...]
FREE, START, DONE = 0, 1, 2
TEXT, MARKER, CHOICE = -1, -2, -3
"""Values of `Grammar.kind` for a state whose next token is no code: any text, one marker, one of several."""

NOTHING, ROW, SCALE, IMAGE = 0, 1, 2, 3
"""Values of `Grammar.event`: the part of an image that a state's token ends."""


@dataclass
class _Node:
    """A state with a choice: where each token leads, and what is allowed; `strict` when nothing else is.

    slots: of each of those tokens the slot in the image whose header it belongs to.
    """

    jumps: dict[int, int]
    strict: bool
    slots: dict[int, int] = field(default_factory=dict)


class Grammar:
    """The state machine of a vocabulary.

    mode: what the model may say after the prompt; prompts may hold text, images and the beginning of an image. eos: the
    end token, or all of them (chat models have several), needed for mode "image". With one known size an image may
    also begin without saying its size.

    Raises: ValueError for an unknown mode, end tokens that are no text, none for mode "image", and a vocabulary without
    codes where images may be drawn.
    """

    def __init__(
        self, vocabulary: VisualVocabulary, mode: Mode = "free", eos: int | Sequence[int] | None = None
    ) -> None:
        require(mode in ("free", "text", "image"), "mode", "'free', 'text' or 'image'", mode)
        self.ends: tuple[int, ...] = () if eos is None else tuple(as_ids(eos, "eos").reshape(-1).tolist())
        visual = vocabulary.is_visual(torch.tensor(self.ends, dtype=torch.int64)).any()
        text = all(0 <= end < vocabulary.size for end in self.ends) and not bool(visual)
        require(text, "eos", f"ids of text tokens, below {vocabulary.size}", self.ends)
        require(mode != "image" or len(self.ends) > 0, "eos", "the id of the end token for mode 'image'", "None")
        require(mode == "text" or len(vocabulary.codes) > 0, "vocabulary", "codes to draw images with", "none")
        self.vocabulary, self.mode = vocabulary, mode
        self.eos = self.ends[0] if self.ends else None
        self.plans = [vocabulary.plan(size.height, size.width) for size in vocabulary.sizes] if vocabulary.codes else []
        self._nodes: list[_Node] = [_Node({}, False), _Node({}, mode == "image"), _Node({}, True)]
        self._bodies: list[int] = []
        self._grow()
        self._build()
        self._tables: dict[tuple[torch.device, int], Tensor] = {}
        self._moved: dict[torch.device, dict[str, Tensor]] = {}
        self._gaps: dict[int, list[Ranges]] = {}

    def _grow(self) -> None:
        """Nodes for all headers, and the first state of each image's body."""
        visual = {m.ids[0] for m in self.vocabulary.markers if len(m.ids) == 1}
        first_body: list[tuple[_Node, int, ImagePlan]] = []
        for plan in self.plans:
            headers = {plan.header, plan.short} if len(self.plans) == 1 else {plan.header}
            for header in sorted(headers):
                node, skipped = self._nodes[FREE], len(plan.header) - len(header)
                for slot, token in enumerate(header[:-1], skipped):
                    node.slots[token] = slot
                    if token not in node.jumps:
                        strict = self.mode == "image" or (self.mode == "free" and header[0] in visual)
                        self._nodes.append(_Node({}, strict))
                        node.jumps[token] = len(self._nodes) - 1
                    node = self._nodes[node.jumps[token]]
                require(header[-1] not in node.jumps, "sizes", "headers that tell the sizes apart", plan.header)
                node.jumps[header[-1]], node.slots[header[-1]] = -1, len(plan.header) - 1
                first_body.append((node, header[-1], plan))
        starts, state = {}, len(self._nodes)
        for plan in self.plans:
            starts[id(plan)] = state
            self._bodies.append(state)
            state += plan.length - len(plan.header)
        for node, token, plan in first_body:
            node.jumps[token] = starts[id(plan)]
        if self.mode == "image":
            self._nodes[START].jumps = dict(self._nodes[FREE].jumps)
            self._nodes[START].slots = dict(self._nodes[FREE].slots)

    def _build(self) -> None:
        """All tables: `base` and `stride` point into `next`, `allowed` into the distinct sets `self.sets`."""
        tokens = sorted({token for node in self._nodes for token in node.jumps})
        width = len(tokens) + 1
        rank = {token: index + 1 for index, token in enumerate(tokens)}
        self.sets: list[Ranges] = []
        index: dict[Ranges, int] = {}

        def allow(ranges: Ranges) -> int:
            if ranges not in index:
                index[ranges] = len(self.sets)
                self.sets.append(ranges)
            return index[ranges]

        following, allowed, slots = [], [], []
        for number in range(len(self._nodes)):
            jumps, otherwise = self._leads(number)
            row, row_slots = [otherwise] * width, [-1] * width
            for token, state in jumps.items():
                row[rank[token]] = state
                row_slots[rank[token]] = {**self._nodes[FREE].slots, **self._nodes[number].slots}[token]
            following += row
            slots += row_slots
            allowed.append(allow(self._node_ranges(number)))
        base = [number * width for number in range(len(self._nodes))]
        parts = {"base": [torch.tensor(base)], "allowed": [torch.tensor(allowed)]}
        kinds = [(CHOICE if len(node.jumps) > 1 else MARKER) if node.strict else TEXT for node in self._nodes]
        parts["kind"] = [torch.tensor(kinds)]
        parts["event"] = [torch.zeros(len(self._nodes), dtype=torch.int64)]
        after, start = [torch.tensor(following)], len(following)
        all_slots = [torch.tensor(slots)]
        for plan, body in zip(self.plans, self._bodies, strict=True):
            skip = len(plan.header)
            count = plan.length - skip
            parts["base"].append(torch.arange(start, start + count))
            states = torch.arange(body + 1, body + count + 1)
            states[-1] = {"free": FREE, "text": START, "image": DONE}[self.mode]
            after.append(states)
            all_slots.append(torch.arange(skip, plan.length))
            start += count
            pairs, inverse = torch.stack([plan.low[skip:], plan.high[skip:]], 1).unique(dim=0, return_inverse=True)
            ranks = torch.tensor([allow(((int(low), int(high)),)) for low, high in pairs])
            parts["allowed"].append(ranks[inverse])
            stream = plan.places[skip:, 0]
            parts["kind"].append(torch.where(stream >= 0, stream, MARKER))
            parts["event"].append(_events(plan)[skip:])
        self._cpu = {name: torch.cat(values) for name, values in parts.items()}
        self._cpu["next"], self._cpu["slot"] = torch.cat(after), torch.cat(all_slots)
        self._cpu["stride"] = (torch.arange(len(self._cpu["base"])) < len(self._nodes)).long()
        rank_of = torch.zeros(max([self.vocabulary.size, *[token + 1 for token in tokens]]), dtype=torch.int64)
        rank_of[tokens] = torch.arange(1, width)
        self._cpu["rank"] = rank_of

    def _leads(self, number: int) -> tuple[dict[int, int], int]:
        """Next node by token, and otherwise: a token that continues no header is text, or begins another."""
        if number == DONE or (number == START and self.mode != "image"):
            return {}, number
        return {**self._nodes[FREE].jumps, **self._nodes[number].jumps}, FREE

    def _node_ranges(self, number: int) -> Ranges:
        """Ranges of tokens that a node allows once the model speaks."""
        node = self._nodes[number]
        if number == DONE:
            return tuple((end, end + 1) for end in sorted(set(self.ends)))
        if node.strict:
            return tuple((token, token + 1) for token in sorted(node.jumps))
        visual = [(code.start, code.start + code.size) for code in self.vocabulary.codes]
        visual += [(m.ids[0], m.ids[0] + 1) for m in self.vocabulary.markers if len(m.ids) == 1]
        ranges = _complement(tuple(visual), self.vocabulary.size)
        if self.mode != "text":
            ranges += tuple((token, token + 1) for token in sorted(node.jumps))
        return ranges

    @property
    def num_states(self) -> int:
        """States of the whole machine."""
        return len(self._cpu["base"])

    def advance(self, state: Tensor, tokens: Tensor) -> Tensor:
        """The states after these tokens; both int64 [B]. Tokens must be allowed ones."""
        return self._look_up("next", state, tokens)

    def slot(self, state: Tensor, tokens: Tensor) -> Tensor:
        """The slots in their images of tokens that follow these states, -1 for text; all int64 [B]."""
        return self._look_up("slot", state, tokens)

    @property
    def tells_images(self) -> bool:
        """True if the first token of every image that the model opens itself can be no text."""
        return self.mode != "free" or all(node.strict for node in self._nodes[DONE + 1 :])

    def _look_up(self, name: str, state: Tensor, tokens: Tensor) -> Tensor:
        table = self._on(state.device)
        return table[name][torch.addcmul(table["base"][state], table["stride"][state], table["rank"][tokens])]

    def mask(self, state: Tensor, scores: Tensor) -> Tensor:
        """Write -inf into scores [B, V] where the states do not allow a token, in place; returns them.

        V may exceed the vocabulary (padded rows of a model, which are never allowed).
        """
        if scores.device.type != "cpu":
            table = self._blocked_for(scores.device, scores.shape[-1])
            return scores.masked_fill_(table[self._on(scores.device)["allowed"][state]], -torch.inf)
        gaps = self._gaps_for(scores.shape[-1])
        sets = self._cpu["allowed"][state].tolist()
        if sets.count(sets[0]) == len(sets):
            for low, high in gaps[sets[0]]:
                scores[:, low:high] = -torch.inf
            return scores
        for row, number in zip(scores.unbind(0), sets, strict=True):
            for low, high in gaps[number]:
                row[low:high] = -torch.inf
        return scores

    def kind(self, state: Tensor) -> Tensor:
        """Kind of the next token, int64 [B]: the index of a stream, or TEXT, MARKER or CHOICE."""
        return self._on(state.device)["kind"][state]

    def event(self, state: Tensor) -> Tensor:
        """Part that the next token ends, int64 [B]: NOTHING, a ROW, a SCALE or the last code of an IMAGE."""
        return self._on(state.device)["event"][state]

    def place(self, state: int) -> tuple[ImagePlan, int] | None:
        """The plan and the slot of a state, or None outside of an image."""
        index = bisect.bisect_right(self._bodies, state) - 1
        if index < 0:
            return None
        plan = self.plans[index]
        return plan, state - self._bodies[index] + len(plan.header)

    def read(self, tokens: Tensor) -> Tensor:
        """The states after prompts, ids [B, L] (left-padded where lengths differ). Refuses a malformed image."""
        tokens = as_ids(tokens, "prompts")
        require(tokens.ndim == 2, "prompts", "ids [B, L]", tokens)
        table, state = self._on(tokens.device), tokens.new_full((len(tokens),), FREE)
        if not bool(torch.isin(tokens, torch.tensor(self._openings(), device=tokens.device)).any()):
            return self.begin(state)
        blocked, size = self._blocked_for(tokens.device, self.vocabulary.size), self.vocabulary.size
        for position in range(tokens.shape[1]):
            token = tokens[:, position]
            bad = (state >= len(self._nodes)) & blocked[table["allowed"][state], token.clamp_max(size - 1)]
            if bool(bad.any()):
                row = int(bad.nonzero()[0])
                found = self.place(int(state[row]))
                assert found is not None
                fail(f"row {row}: {found[0].slot_name(found[1])}", found[0].slot_range(found[1]), int(token[row]))
            state = self.advance(state, token)
            state = torch.where(state == DONE, FREE, state)
        return self.begin(state)

    def begin(self, state: Tensor) -> Tensor:
        """States int64 [B] from which the model speaks: START in place of free text, but for mode "free"."""
        if self.mode == "free":
            return state
        return torch.where(state < (1 if self.mode == "image" else len(self._nodes)), START, state)

    def _openings(self) -> list[int]:
        """Tokens with which a header begins."""
        return sorted(self._nodes[FREE].jumps)

    def _on(self, device: torch.device) -> dict[str, Tensor]:
        if device not in self._moved:
            self._moved[device] = {name: table.to(device) for name, table in self._cpu.items()}
        return self._moved[device]

    def _gaps_for(self, size: int) -> list[Ranges]:
        """Ranges of [0, V) that each distinct set does not allow."""
        if size not in self._gaps:
            need = self.vocabulary.size
            require(size >= need, "scores", f"[B, V], V at least {need}", f"V of {size}")
            self._gaps[size] = [_complement(ranges, size) for ranges in self.sets]
        return self._gaps[size]

    def _blocked_for(self, device: torch.device, size: int) -> Tensor:
        """Bool [sets, V]: what each distinct set does not allow."""
        if (device, size) not in self._tables:
            table = torch.zeros(len(self.sets), size, dtype=torch.bool)
            for row, ranges in zip(table, self._gaps_for(size), strict=True):
                for low, high in ranges:
                    row[low:high] = True
            self._tables[device, size] = table.to(device)
        return self._tables[device, size]

    def to_dict(self) -> dict[str, Any]:
        """The machine as plain data (ready for JSON), to be run elsewhere.

        states[i] has `allow`, a list of [low, high) ranges, and either `next`, or `jump` (token -> state) and `else`.
        """
        states: list[dict[str, Any]] = []
        for number in range(len(self._nodes)):
            jumps, otherwise = self._leads(number)
            by_token = {str(token): after for token, after in sorted(jumps.items())}
            states.append({"allow": self._allow(number), "jump": by_token, "else": otherwise})
        for number in range(len(self._nodes), self.num_states):
            after = int(self._cpu["next"][self._cpu["base"][number]])
            states.append({"allow": self._allow(number), "next": after})
        return {"start": FREE if self.mode == "free" else START, "states": states}

    def _allow(self, state: int) -> list[list[int]]:
        return [list(bounds) for bounds in self.sets[int(self._cpu["allowed"][state])]]


class GrammarProcessor:
    """A `LogitsProcessor` for `transformers` (`generate(logits_processor=[...])`), one state per sequence.

    It keeps the rows of the last call. A row that continues one of them by a token (of another beam, too) goes on from
    its state; any other rows are read as the prompts of a new generation, and so are rows that had all ended. Use a new
    processor where the prompt is exactly the whole of an earlier output that stopped without an end token.
    """

    def __init__(self, grammar: Grammar) -> None:
        self.grammar = grammar
        self._last: tuple[Tensor, Tensor, Tensor] | None = None

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """input_ids int64 [B, L], scores [B, V] -> scores [B, V]."""
        found = self._continued(input_ids)
        if found is None:
            found = self.grammar.read(input_ids), torch.zeros_like(input_ids[:, 0], dtype=torch.bool)
        self._last = (input_ids.clone(), *found)
        return self.grammar.mask(found[0], scores)

    def _continued(self, input_ids: Tensor) -> tuple[Tensor, Tensor] | None:
        """State, and whether an end token has come, of rows that each continue a row of the last call; else None."""
        if self._last is None:
            return None
        rows, state, ended = self._last
        if input_ids.shape[1] != rows.shape[1] + 1 or rows.device != input_ids.device:
            return None
        before, token = input_ids[:, :-1], input_ids[:, -1]
        if not torch.equal(before, rows):
            same = (before[:, None] == rows[None]).all(-1)
            if not bool(same.any(1).all()):
                return None
            index = same.int().argmax(1)
            state, ended = state[index], ended[index]
        ended = ended | torch.isin(token, torch.tensor(self.grammar.ends, dtype=token.dtype, device=token.device))
        return None if bool(ended.all()) else (self.grammar.advance(state, token), ended)


def _complement(ranges: Ranges, size: int) -> Ranges:
    """Parts of [0, size) that lie in none of the ranges."""
    gaps, position = [], 0
    for low, high in sorted(ranges):
        gaps += [(position, low)] if low > position else []
        position = max(position, high)
    return (*gaps, (position, size)) if position < size else tuple(gaps)


def _events(plan: ImagePlan) -> Tensor:
    """Part of an image that each slot's token ends: int64 [n]."""
    events = torch.zeros(plan.length, dtype=torch.int64)
    slots = (plan.places[:, 0] >= 0).nonzero()[:, 0]
    if len(slots) == 0:
        return events
    codes = plan.places[slots]
    last = torch.cat([codes[:-1, :3] != codes[1:, :3], torch.ones(1, 3, dtype=torch.bool)])
    events[slots[last.any(1)]] = ROW
    events[slots[last[:, :2].any(1)]] = SCALE
    events[slots[-1]] = IMAGE
    return events
