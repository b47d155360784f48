"""Binary codes: signs, ids in both bit orders, and entropies of independent bits without the table of all codes.

Sources: Yu et al., Language Model Beats Diffusion (LFQ, arXiv 2310.05737), section 3.1; Zhao et al., Image and Video
Tokenization with Binary Spherical Quantization (BSQ, arXiv 2406.07548), section 3.2; Zhuang et al., WeTok
(arXiv 2508.05599), section 3.1 (groups).
"""

from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

BitOrder = Literal["lsb_first", "msb_first"]
"""Bit of an id that the first channel is: the least significant (Open-MAGVIT2) or the most (Show-o, BSQ)."""

MAX_BITS = 62
"""Bits of one id."""

MAX_JOINT_BITS = 20
"""Bits whose joint distribution is computed, as 2^bits probabilities."""


def signs(x: Float[Tensor, "*n d"]) -> Float[Tensor, "*n d"]:
    """1 where x > 0, else -1 (also at 0)."""
    return (x > 0).to(x.dtype) * 2 - 1


def bits_to_ids(bits: Bool[Tensor, "*n b"], order: BitOrder) -> Int[Tensor, "*n"]:
    """One id, int64, per vector of at most `MAX_BITS` bits."""
    return (bits.long() * _weights(bits.shape[-1], order, bits.device)).sum(-1)


def ids_to_bits(ids: Int[Tensor, "*n"], num_bits: int, order: BitOrder) -> Bool[Tensor, "*n b"]:
    """The inverse of `bits_to_ids`."""
    return ids[..., None] // _weights(num_bits, order, ids.device) % 2 == 1


def _weights(num_bits: int, order: BitOrder, device: torch.device) -> Tensor:
    """Value of each bit in an id."""
    weights = [1 << place for place in range(num_bits)]
    return torch.tensor(weights if order == "lsb_first" else weights[::-1], device=device)


def bit_entropy(log_odds: Float[Tensor, "*n"]) -> Float[Tensor, "*n"]:
    """Entropy in nats of a bit that is set with probability sigmoid(log_odds), without cancellation."""
    size = log_odds.abs()
    return F.softplus(-size) + size * torch.sigmoid(-size)


def joint_probabilities(log_odds: Float[Tensor, "*n b"]) -> Float[Tensor, "*n c"]:
    """Probabilities of all 2^b values of b independent bits; the last bit counts fastest."""
    p = torch.stack([torch.sigmoid(-log_odds), torch.sigmoid(log_odds)], dim=-1)
    joint = log_odds.new_ones((*log_odds.shape[:-1], 1))
    for bit in p.unbind(-2):
        joint = (joint[..., :, None] * bit[..., None, :]).flatten(-2)
    return joint


def group_entropies(
    log_odds: Float[Tensor, "n g b"], *, pool: bool = False, eps: float = 1e-5
) -> tuple[Float[Tensor, "g"], Float[Tensor, "h"]]:
    """Mean entropy of each group of b independent bits, and the entropy of its mean distribution over rows.

    Equal to the entropies of softmax(s <x, c>) over the 2^b codes c in {-1, 1}^b for log odds 2 s x. The mean of N
    joint distributions is a product of two matrices [2^(b/2), N], [N, 2^(b/2)], so that neither the table of codes nor
    an N x 2^b matrix exists. pool: one mean over rows and groups, h = 1 (else h = g). Logarithms of means are
    log(mean + eps).
    """
    rows, groups, bits = log_odds.shape
    sample = bit_entropy(log_odds).sum(-1).sum(0) / max(1, rows)
    first, second = joint_probabilities(log_odds[..., : bits // 2]), joint_probabilities(log_odds[..., bits // 2 :])
    if pool:
        mean = (first.flatten(0, 1).T @ second.flatten(0, 1))[None] / max(1, rows * groups)
    else:
        mean = first.permute(1, 2, 0) @ second.transpose(0, 1) / max(1, rows)
    return sample, -(mean * (mean + eps).log()).sum((1, 2))


def flip_bits(ids: Int[Tensor, "*n"], uniforms: Float[Tensor, "*n"], strength: float) -> Int[Tensor, "*n"]:
    """Ids of one bit each, those flipped whose number in [0, 1) lies below `strength` (Infinity, section 3.4)."""
    return ids ^ (uniforms < strength).long()
