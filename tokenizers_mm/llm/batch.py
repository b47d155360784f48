"""Inputs of a language model: rows of tokens of one length, with labels, masks, position hints and features."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from tokenizers_mm._check import fail, require
from tokenizers_mm.types import ImageCodes, ImageLatents

IGNORED = -100
"""The label of a token that is not learned."""

Side = Literal["left", "right"]


@dataclass(frozen=True)
class ImageFeatures:
    """The features of one image of height x width pixels, made already: one tensor [T, C] per part.

    They go into `Batch.features` as they are, gradients and all. Only in a Segment with as_features=True.
    """

    parts: tuple[Tensor, ...]
    height: int
    width: int


@dataclass(frozen=True)
class Segment:
    """A piece of a row, with more said about it than by a plain text or image.

    content: a text, or an image: PIL, path, float tensor [3, H, W] in [-1, 1], `ImageCodes`, `ImageLatents` of one
    image, or its `ImageFeatures`. learn: whether its tokens are labels. as_features: show an image as continuous
    features instead of ids.
    """

    content: object
    learn: bool = True
    as_features: bool = False


@dataclass(frozen=True)
class Row:
    """One sequence before padding: int64 [n] tokens and labels, places [n, 4], bool [n] is_feature.

    position_ids: int64 [n], and longest_image, how they are counted: see `positions.position_ids`.
    """

    tokens: Tensor
    labels: Tensor
    places: Tensor
    is_feature: Tensor
    position_ids: Tensor
    features: tuple[tuple[Tensor, ...], ...] = ()
    longest_image: int | None = None

    def __len__(self) -> int:
        return self.tokens.shape[0]


@dataclass(frozen=True)
class Batch:
    """Padded rows.

    input_ids, labels, position_ids: int64 [B, L]. attention_mask: int64 [B, L], 1 for a token, 0 for padding; or, for
    packed rows, float [B, 1, L, L], 0 where a token may look and the lowest number where not. places: int64 [B, L, 4],
    for a code or feature its (stream, scale, row, column), else -1. is_feature: bool [B, L], tokens replaced by
    a feature. features: for each image shown as features, in order, one tensor [T, C] per part. longest_image: how the
    position ids are counted (see `positions.position_ids`).
    """

    input_ids: Tensor
    labels: Tensor
    attention_mask: Tensor
    position_ids: Tensor
    places: Tensor
    is_feature: Tensor
    features: tuple[tuple[Tensor, ...], ...] = ()
    longest_image: int | None = None

    def to(self, device: torch.device | str) -> "Batch":
        """The same batch on another device."""
        features = tuple(tuple(part.to(device) for part in image) for image in self.features)
        return Batch(
            self.input_ids.to(device),
            self.labels.to(device),
            self.attention_mask.to(device),
            self.position_ids.to(device),
            self.places.to(device),
            self.is_feature.to(device),
            features,
            self.longest_image,
        )

    def model_inputs(self) -> dict[str, Tensor]:
        """Inputs of a `transformers` causal language model, by name: input_ids, labels, attention_mask, position_ids.

        Raises: ValueError where an image is shown as features.
        """
        if self.features:
            fail("batch", "images as ids (or a projector: see llm.projector.embed)", "images as features")
        inputs = {"input_ids": self.input_ids, "labels": self.labels, "attention_mask": self.attention_mask}
        return {**inputs, "position_ids": self.position_ids}

    def __len__(self) -> int:
        return self.input_ids.shape[0]


def pad_rows(rows: Sequence[Row], pad_id: int, side: Side = "right", length: int | None = None) -> Batch:
    """Rows as a batch, as long as the longest row or `length`."""
    require(side in ("left", "right"), "side", "'left' or 'right'", side)
    require(len(rows) > 0, "rows", "at least one row", "none")
    longest = max(len(row) for row in rows)
    length = longest if length is None else length
    require(longest <= length, "rows", f"at most {length} tokens", f"{longest}")
    counts = {row.longest_image for row in rows}
    require(len(counts) == 1, "rows", "rows of one processor (positions are counted alike)", f"{len(counts)} kinds")

    def stack(parts: list[Tensor], fill: int | bool) -> Tensor:
        out = parts[0].new_full((len(parts), length, *parts[0].shape[1:]), fill)
        for row, part in zip(out, parts, strict=True):
            start = length - len(part) if side == "left" else 0
            row[start : start + len(part)] = part
        return out

    return Batch(
        stack([row.tokens for row in rows], pad_id),
        stack([row.labels for row in rows], IGNORED),
        stack([torch.ones_like(row.tokens) for row in rows], 0),
        stack([row.position_ids for row in rows], 0),
        stack([row.places for row in rows], -1),
        stack([row.is_feature for row in rows], False),
        tuple(image for row in rows for image in row.features),
        counts.pop(),
    )


def join_rows(rows: Sequence[Row], position_ids: Tensor, longest_image: int | None) -> Row:
    """Pieces of one row, in order, with the positions of the whole."""
    tokens = torch.cat([row.tokens for row in rows])
    return Row(
        tokens,
        torch.cat([row.labels for row in rows]),
        torch.cat([row.places for row in rows]),
        torch.cat([row.is_feature for row in rows]),
        position_ids,
        tuple(image for row in rows for image in row.features),
        longest_image,
    )


def make_row(
    tokens: Tensor,
    learn: bool,
    places: Tensor | None = None,
    is_feature: Tensor | None = None,
    slots: Tensor | None = None,
) -> Row:
    """A piece of a row; features carry no label.

    slots: int64 [n], the slots of an image's tokens, None for text; they stand in `position_ids` until pieces are
    joined.
    """
    continuous = torch.zeros_like(tokens, dtype=torch.bool) if is_feature is None else is_feature
    places = tokens.new_full((len(tokens), 4), -1) if places is None else places
    labels = tokens.clone() if learn else torch.full_like(tokens, IGNORED)
    slots = torch.full_like(tokens, -1) if slots is None else slots
    return Row(tokens, labels.masked_fill(continuous, IGNORED), places, continuous, slots)


def with_features(row: Row, features: tuple[Tensor, ...]) -> Row:
    """The same piece with the features of its image."""
    return replace(row, features=(features,))


def one_image(content: ImageCodes | ImageLatents) -> ImageCodes | ImageLatents:
    """Codes or latents, refused unless they are of one image."""
    require(len(content) == 1, "image codes", "codes of one image", f"of {len(content)}")
    return content
