"""Text and images, in any number and order, to rows of tokens, and back."""

import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from tokenizers_mm._check import fail, naming, require
from tokenizers_mm._files import atomic_directory, write_json
from tokenizers_mm._images import Fit, fit_image, image_to_tensor, name_images, open_image
from tokenizers_mm._origin import OriginCheck
from tokenizers_mm.config import from_mapping, read_json, to_mapping
from tokenizers_mm.llm.batch import (
    Batch,
    ImageFeatures,
    Row,
    Segment,
    Side,
    join_rows,
    make_row,
    one_image,
    pad_rows,
    with_features,
)
from tokenizers_mm.llm.ids import as_ids
from tokenizers_mm.llm.layout import IMAGE_START
from tokenizers_mm.llm.parsing import ImageRun, Malformed, Parser
from tokenizers_mm.llm.positions import Mode, position_ids
from tokenizers_mm.llm.transformers_api import load_text_tokenizer, save_text_tokenizer
from tokenizers_mm.llm.vocabulary import VisualVocabulary
from tokenizers_mm.models.base import ImageTokenizer
from tokenizers_mm.models.loading import load_directory
from tokenizers_mm.types import ImageCodes, ImageLatents

Content = Any
"""A text, an image (PIL, a `Path`, a float tensor [3, H, W], `ImageCodes` or `ImageLatents` of one) or a `Segment`."""


SETTINGS = "multimodal_processor.json"
"""The file of a saved processor's own settings."""


@dataclass(frozen=True)
class ProcessorSettings:
    """Settings of its own that a saved processor remembers: see `MultimodalProcessor`."""

    fit: Fit = "refuse"
    positions: Mode = "order"


class MultimodalProcessor:
    """Between rows of text and images, and tokens.

    tokenizer: the image tokenizer. text_tokenizer: of the language model. fit: what to do with a picture of a size that
    is not in the vocabulary ("refuse", or bring it to the one nearest in shape by "crop", "pad" or "resize").
    positions: what `position_ids` count: "order", all tokens; "slots", in an image its slots from 0, and text from the
    length of the longest image on (so that with learned position embeddings a place in an image is always the same).
    features: what images are shown as where a Segment asks for features: a function of images that gives [B, T, C] or
    [B, h, w, C], or several of them by name or in a tuple (DualViTok's `stream_features`); by default the tokenizer's.
    any_tokenizer: take a vocabulary that was saved with another image tokenizer, too.
    """

    def __init__(
        self,
        tokenizer: ImageTokenizer,
        text_tokenizer: Any,
        vocabulary: VisualVocabulary,
        fit: Fit = "refuse",
        positions: Mode = "order",
        features: Callable[[Any], Any] | None = None,
        any_tokenizer: bool = False,
    ) -> None:
        if vocabulary.tokenizer:
            OriginCheck(tokenizer, any_tokenizer)("vocabulary", vocabulary.tokenizer)
        require(positions in ("order", "slots"), "positions", "'order' or 'slots'", positions)
        vocabulary.check_text_tokenizer(text_tokenizer)
        self.tokenizer, self.text_tokenizer, self.vocabulary = tokenizer, text_tokenizer, vocabulary
        self.fit: Fit = fit
        self.features = features or tokenizer.features
        lengths = [vocabulary.plan(size.height, size.width).length for size in vocabulary.sizes]
        self.longest_image = max(lengths, default=0) if positions == "slots" else None
        self.parser = Parser(vocabulary)
        self.prefix, self.eos, self.pad = _special_ids(text_tokenizer)
        self._no_text = torch.tensor(
            [m.ids[0] for m in vocabulary.markers if len(m.ids) == 1 and not m.name.startswith(("height_", "width_"))],
            dtype=torch.int64,
        )

    def __repr__(self) -> str:
        codes = ", ".join(f"{code.size:,} of {code.stream}" for code in self.vocabulary.codes) or "none"
        sizes = len(self.vocabulary.sizes)
        shown = f"codes {codes}, {sizes} image size{'' if sizes == 1 else 's'}, fit {self.fit!r}"
        return f"MultimodalProcessor({self.tokenizer.family}, {self.vocabulary.text_size:,} text tokens, {shown})"

    def __call__(
        self,
        rows: Sequence[Content | Sequence[Content]],
        *,
        end: bool = True,
        side: Side = "right",
        max_length: int | None = None,
    ) -> Batch:
        """Rows to a batch.

        rows: each a text, an image, or a list of them. end: close each row with the end token (leave it out for a
        prompt, and pad a batch of prompts on the left). max_length: rows longer than this are an error, never cut.
        """
        made = self.rows(rows, end=end)
        for index, row in enumerate(made):
            if max_length is not None and len(row) > max_length:
                fail(f"row {index}", f"at most {max_length} tokens", f"{len(row)}")
        return pad_rows(made, self.pad, side)

    def rows(self, rows: Sequence[Content | Sequence[Content]], end: bool = True) -> list[Row]:
        """Rows to sequences without padding, for packing."""
        require(not isinstance(rows, str), "rows", "a list of rows", "one text")
        split = [self._segments(row) for row in rows]
        codes = self._encode_all([s for row in split for s in row if not isinstance(s.content, str)])
        made = []
        for row in split:
            pieces = [make_row(torch.tensor(self.prefix, dtype=torch.int64), learn=False)]
            for segment in row:
                pieces.append(self._piece(segment, codes))
            if end and self.eos is not None:
                pieces.append(make_row(torch.tensor([self.eos]), learn=not row or row[-1].learn))
            slots = torch.cat([piece.position_ids for piece in pieces])
            positions = position_ids(slots, self.longest_image or 0, self.longest_image)
            made.append(join_rows(pieces, positions, self.longest_image))
            require(len(made[-1]) > 0, f"row {len(made) - 1}", "at least one token", "none")
        return made

    def opening(self, height: int | None = None, width: int | None = None) -> Segment:
        """The tokens with which an image begins, up to where its codes may follow: put at the end of a prompt.

        height, width: the size to draw; left out, the model says it where the layout has sizes.
        """
        if height is None or width is None:
            ids = () if self.vocabulary.layout.size == "before" else self.vocabulary.marker(IMAGE_START)
        else:
            ids = self.vocabulary.plan(height, width).header
        return Segment(_Tokens(torch.tensor(ids, dtype=torch.int64)))

    def decode(
        self,
        ids: Any,
        *,
        images: Literal["pil", "codes"] = "pil",
        malformed: Malformed = "refuse",
        skip_special_tokens: bool = True,
        prompts: Batch | None = None,
    ) -> list[list[Any]]:
        """Rows of ids back to lists of texts and images.

        ids: [B, L], or B rows of any lengths: whole numbers of any kind in tensors, arrays or lists. images: PIL images
        (decoded together, by size) or `ImageCodes` of one image. malformed: for an image that is not whole: "refuse"
        (ValueError), "skip", or "repair" (make one of the codes that are there). prompts: rows that the ids continue;
        then only what is new is returned, with an image that began in its prompt.
        """
        require(images in ("pil", "codes"), "images", "'pil' or 'codes'", images)
        rows: list[list[Any]] = []
        new = self._id_rows(ids)
        before = [torch.zeros(0, dtype=torch.int64)] * len(new)
        if prompts is not None:
            require(len(prompts) == len(new), "prompts", f"{len(new)} rows", f"{len(prompts)}")
            kept = prompts.attention_mask.cpu() > 0
            before = [row[mask] for row, mask in zip(prompts.input_ids.cpu(), kept, strict=True)]
        for prompt, answer in zip(before, new, strict=True):
            tokens, row = torch.cat([prompt, answer]), []
            for run in self.parser.parse(tokens, malformed):
                if run.end <= len(prompt):
                    continue
                if isinstance(run, ImageRun):
                    row.append(run.codes)
                    continue
                said = tokens[max(run.start, len(prompt)) : run.end].tolist()
                text = self.text_tokenizer.decode(said, skip_special_tokens=skip_special_tokens)
                row += [text] if text else []
            rows.append(row)
        return self._to_images(rows) if images == "pil" else rows

    @staticmethod
    def _id_rows(ids: Any) -> list[Tensor]:
        """Rows int64 [L] on the CPU."""
        whole = isinstance(ids, (Tensor, np.ndarray))
        require(whole or isinstance(ids, (list, tuple)), "ids", "rows of ids [B, L]", ids)
        rows = as_ids(ids, "ids") if whole else [as_ids(row, f"ids[{index}]") for index, row in enumerate(ids)]
        flat = rows.ndim != 2 if isinstance(rows, Tensor) else any(row.ndim != 1 for row in rows)
        require(not flat, "ids", "rows of ids [B, L]", ids if whole else "numbers without rows")
        return [row.cpu() for row in rows]

    def save(self, directory: str | os.PathLike[str]) -> None:
        """Write the text tokenizer, visual_vocab.json and multimodal_processor.json.

        The image tokenizer is saved by its own `save`; in the folder `tokenizer` inside, `from_pretrained` finds it.
        """
        settings = ProcessorSettings(self.fit, "order" if self.longest_image is None else "slots")
        with atomic_directory(directory) as folder:
            save_text_tokenizer(self.text_tokenizer, folder)
            replace(self.vocabulary, tokenizer=self.tokenizer.fingerprint()).save(folder)
            write_json(folder / SETTINGS, to_mapping(settings))

    @classmethod
    def from_pretrained(
        cls,
        directory: str | os.PathLike[str],
        tokenizer: ImageTokenizer | None = None,
        features: Callable[[Any], Any] | None = None,
        any_tokenizer: bool = False,
    ) -> "MultimodalProcessor":
        """Read what `save` wrote.

        tokenizer: the image tokenizer; None reads the folder `tokenizer` inside of the directory. features: as for a
        new processor; a function is not saved. any_tokenizer: take another tokenizer than the one it was saved with.
        """
        folder = Path(directory)
        images = load_directory(folder / "tokenizer") if tokenizer is None else tokenizer
        vocabulary = VisualVocabulary.load_for(images, folder, any_tokenizer)
        path = folder / SETTINGS
        settings = ProcessorSettings()  # of a folder from before there was such a file
        if path.is_file():
            settings = from_mapping(ProcessorSettings, read_json(path), str(path))
        text = load_text_tokenizer(folder, str(folder))
        return cls(images, text, vocabulary, settings.fit, settings.positions, features, any_tokenizer)

    @torch.no_grad()
    def _to_images(self, rows: list[list[Any]]) -> list[list[Any]]:
        places: dict[tuple[int, int], list[tuple[int, int]]] = {}
        for r, row in enumerate(rows):
            for c, item in enumerate(row):
                if isinstance(item, ImageCodes):
                    places.setdefault((item.height, item.width), []).append((r, c))
        for cells in places.values():
            items = [rows[r][c] for r, c in cells]
            ids = torch.cat([item.ids for item in items]).to(self.tokenizer.device)
            pictures = self.tokenizer.decode(ImageCodes(ids, items[0].height, items[0].width, items[0].streams))
            for (r, c), picture in zip(cells, self.tokenizer.to_pil(pictures), strict=True):
                rows[r][c] = picture
        return rows

    def _segments(self, row: Content | Sequence[Content]) -> list[Segment]:
        parts = row if isinstance(row, (list, tuple)) else [row]
        segments = [part if isinstance(part, Segment) else Segment(part) for part in parts]
        for segment in segments:
            if not isinstance(
                segment.content, (str, Image.Image, Path, Tensor, ImageCodes, ImageLatents, ImageFeatures, _Tokens)
            ):
                fail("row", "texts, images, paths, image codes or Segments", type(segment.content).__name__)
        return segments

    def _piece(self, segment: Segment, codes: dict[int, Any]) -> Row:
        content = segment.content
        if isinstance(content, _Tokens):
            return make_row(content.ids, segment.learn, slots=torch.arange(len(content.ids)))
        if isinstance(content, str):
            return make_row(self._text(content), segment.learn)
        found = codes[id(segment)]
        if segment.as_features:
            return self._feature_piece(found)
        plan = self.vocabulary.plan(found.height, found.width)
        tokens = self.vocabulary.to_tokens(found)[0].cpu()
        return make_row(tokens, segment.learn, plan.places, slots=torch.arange(len(tokens)))

    def _text(self, text: str) -> Tensor:
        ids = torch.tensor(self.text_tokenizer(text, add_special_tokens=False)["input_ids"], dtype=torch.int64)
        stray = torch.isin(ids, self._no_text) | (self.vocabulary.code(ids)[0] >= 0)
        if bool(stray.any()):
            fail("text", "no image tokens", f"{int(ids[stray][0])} in {text[:40]!r}")
        return ids

    def _feature_piece(self, features: tuple[tuple[Tensor, ...], tuple[int, int]]) -> Row:
        """An image as features: in the slots of its codes where the counts agree, else in a plain run."""
        parts, size = features
        counts = [part.shape[0] for part in parts]
        known = any((s.height, s.width) == size for s in self.vocabulary.sizes) and len(self.vocabulary.codes) > 0
        if known:
            plan = self.vocabulary.plan(*size)
            if counts == [stream.num_ids for stream in plan.streams] and len(parts) > 1:
                start = len(plan.header) - len(plan.short)
                places, slots = plan.places[start:], torch.arange(start, plan.length)
                return with_features(make_row(plan.low[start:], False, places, places[:, 0] >= 0, slots), parts)
        inside = torch.full((sum(counts),), self.pad, dtype=torch.int64)
        every, slots = torch.ones_like(inside, dtype=torch.bool), torch.arange(len(inside))
        return with_features(make_row(inside, False, is_feature=every, slots=slots), parts)

    @torch.no_grad()
    def _encode_all(self, segments: list[Segment]) -> dict[int, Any]:
        """Codes (or features, and the size) by segment; pictures of one size go through the tokenizer together."""
        done: dict[int, Any] = {}
        groups: dict[tuple[int, int, bool], list[tuple[Segment, Tensor]]] = {}
        for segment in segments:
            content = segment.content
            if isinstance(content, _Tokens):
                continue
            if isinstance(content, ImageFeatures):
                require(segment.as_features, "ImageFeatures", "a Segment with as_features=True", "as_features=False")
                done[id(segment)] = (content.parts, (content.height, content.width))
                continue
            if isinstance(content, (ImageCodes, ImageLatents)):
                whole = one_image(content)
                size = (content.height, content.width)
                done[id(segment)] = (self._features(whole)[0], size) if segment.as_features else whole
                continue
            x = self._picture(content)
            groups.setdefault((x.shape[1], x.shape[2], segment.as_features), []).append((segment, x))
        for (height, width, as_features), group in groups.items():
            x = torch.stack([x for _, x in group])
            if as_features:
                found: list[Any] = [(parts, (height, width)) for parts in self._features(x)]
            else:
                codes = self.tokenizer.encode(x)
                if isinstance(codes, ImageLatents):
                    fail("image", "a Segment with as_features=True (this tokenizer is continuous)", "an image as ids")
                found = [ImageCodes(ids[None], height, width, codes.streams) for ids in codes.ids.cpu()]
            done |= {id(segment): item for (segment, _), item in zip(group, found, strict=True)}
        for segment in segments:
            if isinstance(done.get(id(segment)), ImageLatents):
                fail("image", "a Segment with as_features=True (this tokenizer is continuous)", "an image as ids")
        return done

    def feature_dims(self) -> tuple[int, ...]:
        """Channels of each part of an image's features."""
        size = self.vocabulary.sizes[0] if self.vocabulary.sizes else None
        height, width = self.tokenizer.image_size or ((size.height, size.width) if size else (0, 0))
        with torch.no_grad():
            return tuple(part.shape[-1] for part in self._features(torch.zeros(1, 3, height, width))[0])

    def _features(self, images: Any) -> list[tuple[Tensor, ...]]:
        """Features per image: one tensor [T, C] per part (a tokenizer may give several parts)."""
        found = self.features(images.to(self.tokenizer.device))
        found = found.values() if isinstance(found, Mapping) else found
        parts = [part.detach().cpu() for part in ((found,) if isinstance(found, Tensor) else found)]
        return [tuple(part[i].reshape(-1, part.shape[-1]) for part in parts) for i in range(parts[0].shape[0])]

    def _picture(self, content: Any) -> Tensor:
        if isinstance(content, Tensor):
            require(content.ndim == 3 and content.shape[0] == 3, "image", "float [3, H, W] in [-1, 1]", content)
            return content
        ((name, item),) = name_images(content)
        picture = open_image(item, name)
        if self.fit != "refuse" and self.vocabulary.sizes:
            with naming(name):
                picture = fit_image(picture, *self.nearest_size(picture.height, picture.width), self.fit)
        return image_to_tensor(picture)

    def nearest_size(self, height: int, width: int) -> tuple[int, int]:
        """The size of the vocabulary nearest in shape, then in area; the picture's own where it is one."""
        sizes = [(size.height, size.width) for size in self.vocabulary.sizes]

        def distance(size: tuple[int, int]) -> tuple[float, float]:
            shape = abs(math.log(size[0] * width / (size[1] * height)))
            return round(shape, 6), abs(math.log(size[0] * size[1] / (height * width)))

        return min(sizes, key=distance)


class _Tokens:
    """A piece of a row that is tokens already."""

    def __init__(self, ids: Tensor) -> None:
        self.ids = ids


def _special_ids(text_tokenizer: Any) -> tuple[list[int], int | None, int]:
    """Ids that a text tokenizer puts before a text, its end token, and the token to pad with."""
    eos = text_tokenizer.eos_token_id
    prefix = list(text_tokenizer("")["input_ids"])
    while prefix and prefix[-1] == eos and prefix[-1] != text_tokenizer.bos_token_id:
        prefix.pop()
    pad = text_tokenizer.pad_token_id
    return prefix, eos, next(value for value in (pad, eos, 0) if value is not None)
