"""Drawing tokens from logits: temperature, top-k, nucleus, guidance.

Source: Holtzman et al., The Curious Case of Neural Text Degeneration (arXiv 1904.09751), section 3.1 (nucleus); Ho and
Salimans, Classifier-Free Diffusion Guidance (arXiv 2207.12598), eq. 6, on log-probabilities.
"""

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor


def guide_logits(
    conditional: Float[Tensor, "*n v"], unconditional: Float[Tensor, "*n v"], scale: float
) -> Float[Tensor, "*n v"]:
    """scale * (log p_c - log p_u) + log p_u; a scale of 1 gives log p_c. (1 + t) c - t u is scale = 1 + t."""
    log_c, log_u = conditional.float().log_softmax(-1), unconditional.float().log_softmax(-1)
    return log_u + scale * (log_c - log_u)


def filter_logits(
    logits: Float[Tensor, "n v"], temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0
) -> tuple[Float[Tensor, "n k"], Int[Tensor, "n k"] | None]:
    """Logits over temperature, then the `top_k` largest, then the smallest set that holds `top_p` of what is left.

    Returns the kept logits (-inf for what is not kept), largest first, and the tokens they belong to; or all logits in
    their order and None where all are kept. The largest is always kept. A temperature of 0 keeps only the largest;
    top_k of 0 and top_p of 1 keep all.
    """
    if temperature == 0:
        values, index = logits.max(-1, keepdim=True)
        return values, index
    logits = logits / temperature
    size = logits.shape[-1]
    if not 0 < top_k < size and top_p >= 1:
        return logits, None
    values, index = logits.topk(min(top_k or size, size))
    if top_p < 1:
        p = values.softmax(-1)
        dropped = p.cumsum(-1) - p >= top_p
        dropped[..., 0] = False
        values = values.masked_fill(dropped, -torch.inf)
    return values, index


def sample_logits(
    logits: Float[Tensor, "n v"],
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    generator: torch.Generator | None = None,
) -> Int[Tensor, "n"]:
    """One token per row, drawn from what `filter_logits` keeps."""
    values, index = filter_logits(logits, temperature, top_k, top_p)
    drawn = draw(values.softmax(-1), generator)
    return drawn if index is None else index.gather(-1, drawn[:, None])[:, 0]


def draw(p: Float[Tensor, "n v"], generator: torch.Generator | None = None, width: int = 256) -> Int[Tensor, "n"]:
    """One index per row with these probabilities, by the inverse of the cumulative sum, in two steps.

    First a block of `width`, then a place in it, so no sum over all of v is stored. Never an index of probability 0.
    """
    blocks = F.pad(p, (0, -p.shape[-1] % width)).unflatten(-1, (-1, width))
    ends = blocks.sum(-1, dtype=torch.float64).cumsum(-1)
    u = torch.rand(p.shape[0], 1, dtype=torch.float64, device=p.device, generator=generator)
    target = _below(u * ends[:, -1:], ends[:, -1:])
    block = torch.searchsorted(ends, target, right=True)
    inside = blocks.take_along_dim(block[..., None], 1)[:, 0].to(torch.float64).cumsum(-1)
    start = ends.gather(-1, (block - 1).clamp_min(0)).masked_fill(block == 0, 0)
    place = torch.searchsorted(inside, _below((target - start).clamp_min(0), inside[:, -1:]), right=True)
    return (block * width + place)[:, 0]


def _below(value: Tensor, bound: Tensor) -> Tensor:
    """`value`, or the largest number below `bound`."""
    return torch.minimum(value, torch.nextafter(bound, torch.zeros_like(bound)))
