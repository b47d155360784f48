"""Several codebooks that share one index per position (TokenFlow, arXiv 2412.03069, section 3.2, eq. 3-5)."""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor


def normalize_parts(x: Float[Tensor, "*n d"], dims: tuple[int, ...]) -> Float[Tensor, "*n d"]:
    """Divide each part of the last axis (sizes `dims`) by its own L2 norm, at least 1e-12."""
    return torch.cat([F.normalize(part, dim=-1) for part in x.split(dims, dim=-1)], dim=-1)
