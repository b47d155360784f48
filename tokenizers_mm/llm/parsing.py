"""A row of tokens as text and images, and nothing in between."""

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from tokenizers_mm._check import fail, require
from tokenizers_mm.llm.ids import as_ids, refuse_labels
from tokenizers_mm.llm.layout import IMAGE_END, IMAGE_START, ImagePlan
from tokenizers_mm.llm.vocabulary import VisualVocabulary
from tokenizers_mm.types import ImageCodes

Malformed = Literal["refuse", "skip", "repair"]
"""For an image that is not whole: an error, no image, or an image made of the codes that are there."""


@dataclass(frozen=True)
class TextRun:
    """Tokens [start, end) that are text."""

    start: int
    end: int


@dataclass(frozen=True)
class ImageRun:
    """Tokens [start, end) that are an image, and its codes, [1, L]."""

    start: int
    end: int
    codes: ImageCodes


class Parser:
    """Finds the images in rows of tokens."""

    def __init__(self, vocabulary: VisualVocabulary) -> None:
        self.vocabulary = vocabulary
        self._tree: dict[int, Any] = {}
        plans = [vocabulary.plan(size.height, size.width) for size in vocabulary.sizes] if vocabulary.codes else []
        for plan in plans:
            for header in {plan.header, plan.short} if len(plans) == 1 else {plan.header}:
                node = self._tree
                for token in header[:-1]:
                    node = node.setdefault(token, {})
                node[header[-1]] = plan
        begin, end = (vocabulary.marker(name) if plans else () for name in (IMAGE_START, IMAGE_END))
        self._begin = begin[0] if len(begin) == 1 else None
        self._end = end[0] if len(end) == 1 else None
        self._silent = {m.ids[0] for m in vocabulary.markers if m.name.startswith(("height_", "width_")) or not plans}

    def parse(self, tokens: Tensor, malformed: Malformed = "refuse") -> list[TextRun | ImageRun]:
        """One row of ids [L] as runs, in order. Size markers may stand in text; any other lone image token may not."""
        require(malformed in ("refuse", "skip", "repair"), "malformed", "'refuse', 'skip' or 'repair'", malformed)
        tokens = as_ids(tokens, "tokens").cpu()
        require(tokens.ndim == 1, "tokens", "ids [L]", tokens)
        refuse_labels(tokens)
        ids = tokens.tolist()
        visual = self.vocabulary.is_visual(tokens)
        runs: list[TextRun | ImageRun] = []
        start = position = 0

        def close(end: int) -> None:
            if end > start:
                runs.append(TextRun(start, end))

        while position < len(ids):
            found = self._match(ids, position)
            if found is None:
                if bool(visual[position]) and ids[position] not in self._silent:
                    if malformed == "refuse":
                        fail(f"token {position}", "text or the start of an image", f"image token {ids[position]}")
                    close(position)
                    start = position + 1
                position += 1
                continue
            plan, skipped = found
            close(position)
            run, start = self._image(tokens, visual, plan, position, skipped, malformed)
            if run is not None:
                runs.append(run)
            position = start
        close(len(ids))
        return runs

    def _match(self, ids: list[int], position: int) -> tuple[ImagePlan, int] | None:
        """The image whose header stands here, and how many of its slots are left out."""
        node, start = self._tree, position
        while position < len(ids):
            after = node.get(ids[position])
            if after is None:
                return None
            position += 1
            if isinstance(after, ImagePlan):
                return after, len(after.header) - (position - start)
            node = after
        return None

    def _image(
        self, tokens: Tensor, visual: Tensor, plan: ImagePlan, position: int, skipped: int, malformed: Malformed
    ) -> tuple[ImageRun | None, int]:
        """The image that begins here, or None where it is skipped, and the token after it."""
        end = position + plan.length - skipped
        row = torch.cat([plan.low[:skipped], tokens[position:end]])
        try:
            if len(row) < plan.length:
                fail(f"image at token {position}", f"{plan.length - skipped} tokens", f"{len(tokens) - position}")
            return ImageRun(position, end, plan.to_codes(row[None])), end
        except ValueError:
            if malformed == "refuse":
                raise
        after = position + len(plan.header) - skipped
        while after < len(tokens) and bool(visual[after]) and int(tokens[after]) not in (self._begin, self._end):
            after += 1
        body = tokens[position:after]
        if self._end is not None and after < len(tokens) and int(tokens[after]) == self._end:
            after += 1
        if malformed == "skip":
            return None, after
        return ImageRun(position, after, repair(self.vocabulary, body, plan)), after


def repair(vocabulary: VisualVocabulary, tokens: Tensor, plan: ImagePlan) -> ImageCodes:
    """Codes from a broken image: of each stream those that are there, cut or filled with the last one (or with 0)."""
    stream, codes = vocabulary.code(tokens)
    parts = []
    for index, wanted in enumerate(plan.streams):
        have = codes[stream == index][: wanted.num_ids]
        fill = have[-1:] if len(have) else torch.zeros(1, dtype=torch.int64)
        parts.append(torch.cat([have, fill.expand(wanted.num_ids - len(have))]))
    return ImageCodes(torch.cat(parts)[None], plan.height, plan.width, plan.streams)
