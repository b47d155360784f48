"""Token ids as callers have them, to int64."""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from tokenizers_mm._check import fail

SIGNED = {torch.int8, torch.int16, torch.int32, torch.uint8, torch.int64}
UNSIGNED = {torch.uint16, torch.uint32, torch.uint64}


def as_ids(ids: Any, name: str) -> Tensor:
    """Whole numbers of any kind (tensor, array, numbers in lists) as an int64 tensor of the same shape and device.

    Raises: ValueError for floats, booleans and lists of unequal lengths.
    """
    if isinstance(ids, Tensor):
        if ids.dtype not in SIGNED | UNSIGNED:
            fail(name, "whole numbers", ids)
        return ids.long()
    try:
        array = np.asarray(ids)
    except (ValueError, TypeError, OverflowError):
        fail(name, "whole numbers, in lists of one length", type(ids).__name__)
    if array.size == 0:
        return torch.zeros(array.shape, dtype=torch.int64)
    if array.dtype.kind not in "iu":
        fail(name, "whole numbers", f"{array.dtype} {list(array.shape)}")
    return torch.from_numpy(array.astype(np.int64))


def refuse_labels(tokens: Tensor) -> None:
    """ValueError for negative ids in int64 [L]; labels have them."""
    wrong = (tokens < 0).nonzero()
    if len(wrong):
        place = int(wrong[0])
        what = "an id from 0 on (labels say -100 where nothing is learned: decode input_ids)"
        fail(f"token {place}", what, int(tokens[place]))
