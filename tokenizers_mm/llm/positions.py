"""Position ids, by one rule for training and for generation."""

from typing import Literal

import torch
from torch import Tensor

Mode = Literal["order", "slots"]
"""Tokens that position ids count: all of a row; or in an image its slots from 0, and text from the longest image on."""


def position_ids(slots: Tensor, first_text: Tensor | int, longest_image: int | None) -> Tensor:
    """Position ids int64 [..., n] of tokens in a row.

    slots: int64 [..., n], for a token of an image its slot there (0 for the first), -1 for text. first_text: int64
    [..., 1] or a number, the position of the next token in mode "order", and of the next text in mode "slots".
    longest_image: None in mode "order"; else the slots of the longest image, the position of a row's first text.
    """
    if longest_image is None:
        return first_text + torch.arange(slots.shape[-1], device=slots.device).expand_as(slots)
    return torch.where(slots >= 0, slots, first_text + (slots < 0).cumsum(-1) - 1)


def next_position(positions: Tensor, mask: Tensor, longest_image: int | None) -> Tensor:
    """The `first_text` [B, 1] with which rows go on, from their position ids and mask (0 at padding), int64 [B, L]."""
    before = positions.masked_fill(mask == 0, -1).amax(-1, keepdim=True)
    return 1 + (before if longest_image is None else before.clamp_min(longest_image - 1))


def counted(mask: Tensor) -> Tensor:
    """Position ids int64 [B, L] of the tokens that a mask [B, L] leaves, in order; 0 for padding at the left."""
    return (mask.long().cumsum(-1) - 1).clamp_min(0)
