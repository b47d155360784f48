"""Noise injection into quantized vectors, in training only: the decoder learns to live with wrong codes.

Source: the released code of ILLUME+ (arXiv 2504.01934, section 3.1).
"""

from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

NoiseKind = Literal["random", "zero"]


def inject_noise(
    vectors: Float[Tensor, "b h w d"],
    u_sample: Float[Tensor, "b"],
    u_position: Float[Tensor, "b h w"],
    sample_rate: float,
    position_rate: float,
    kind: NoiseKind = "random",
) -> Float[Tensor, "b h w d"]:
    """Disturb a share `sample_rate` of the samples at a share `position_rate` of their positions.

    The uniforms in [0, 1) decide: a position is disturbed where u_sample <= sample_rate and u_position <=
    position_rate. "random" puts the vector that the previous sample of the batch has there, detached (so a batch of one
    stays as it is); "zero" puts zeros.
    """
    disturbed = (u_sample <= sample_rate)[:, None, None] & (u_position <= position_rate)
    other = vectors.detach().roll(1, dims=0) if kind == "random" else torch.zeros_like(vectors)
    return torch.where(disturbed[..., None], other, vectors)
