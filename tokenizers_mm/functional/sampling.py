"""Drawing tokens from logits: temperature, top-k, nucleus, guidance.

Source: Holtzman et al., The Curious Case of Neural Text Degeneration (arXiv 1904.09751), section 3.1 (nucleus); Ho and
Salimans, Classifier-Free Diffusion Guidance (arXiv 2207.12598), eq. 6, on log-probabilities.
"""

import torch
from jaxtyping import Float
from torch import Tensor


def guide_logits(
    conditional: Float[Tensor, "*n v"], unconditional: Float[Tensor, "*n v"], scale: float
) -> Float[Tensor, "*n v"]:
    """scale * (log p_c - log p_u) + log p_u; a scale of 1 gives log p_c. (1 + t) c - t u is scale = 1 + t."""
    log_c, log_u = conditional.float().log_softmax(-1), unconditional.float().log_softmax(-1)
    return log_u + scale * (log_c - log_u)


def filter_logits(
    logits: Float[Tensor, "*n v"], temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0
) -> Float[Tensor, "*n v"]:
    """Logits over temperature, then the `top_k` largest, then the smallest set that holds `top_p` of what is left.

    What is not kept becomes -inf; the largest is always kept. A temperature of 0 keeps only the largest; top_k of 0
    and top_p of 1 keep all.
    """
    if temperature == 0:
        top_k, temperature = 1, 1.0
    logits = logits / temperature
    size = logits.shape[-1]
    if not 0 < top_k < size and top_p >= 1:
        return logits
    values, index = logits.topk(min(top_k or size, size))
    if top_p < 1:
        p = values.softmax(-1)
        dropped = p.cumsum(-1) - p >= top_p
        dropped[..., 0] = False
        values = values.masked_fill(dropped, -torch.inf)
    return torch.full_like(logits, -torch.inf).scatter(-1, index, values)
