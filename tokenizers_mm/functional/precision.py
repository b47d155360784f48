"""The dtype in which parts compute that must not compute in half precision."""

import torch
from torch import Tensor


def at_least_float32(x: Tensor) -> Tensor:
    """x in float32; float64 stays, so that a model converted to float64 computes in float64 throughout."""
    return x if x.dtype == torch.float64 else x.float()
