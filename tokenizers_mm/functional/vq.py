"""Vector quantization: straight-through values and the loss terms.

Source: van den Oord et al., Neural Discrete Representation Learning (arXiv 1711.00937), eq. 3; Zhu et al., Addressing
Representation Collapse in Vector Quantized Models with One Linear Layer (SimVQ, arXiv 2411.02038); Fifty et al.,
Restructuring Vector Quantization with the Rotation Trick (arXiv 2410.06424), section 4.
"""

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from tokenizers_mm.functional.assignment import assignment_entropies


def straight_through(z: Float[Tensor, "*n d"], vectors: Float[Tensor, "*n d"]) -> Float[Tensor, "*n d"]:
    """The value of `vectors` with the gradient of `z`."""
    return z + (vectors - z).detach()


def rotate_to(z: Float[Tensor, "*n d"], vectors: Float[Tensor, "*n d"]) -> Float[Tensor, "*n d"]:
    """The value of `vectors`; the gradient passes to `z` through the rotation and scaling that takes z to them."""
    norm_z, norm_v = z.norm(dim=-1, keepdim=True), vectors.norm(dim=-1, keepdim=True)
    from_unit = (z / norm_z.clamp_min(1e-6)).detach()
    to_unit = (vectors / norm_v.clamp_min(1e-6)).detach()
    middle = F.normalize(from_unit + to_unit, dim=-1, eps=1e-6)
    rotated = z - 2 * (z * middle).sum(-1, keepdim=True) * middle + 2 * (z * from_unit).sum(-1, keepdim=True) * to_unit
    return rotated * (norm_v / norm_z.clamp_min(1e-6)).detach()


def vq_terms(z: Float[Tensor, "*n d"], vectors: Float[Tensor, "*n d"]) -> dict[str, Tensor]:
    """Unweighted terms, means over all elements: `codebook` moves only the codes, `commitment` only the encoder."""
    return {
        "codebook": (vectors - z.detach()).square().mean(),
        "commitment": (vectors.detach() - z).square().mean(),
    }


def codebook_entropy(
    z: Float[Tensor, "n d"], codebook: Float[Tensor, "k d"], temperature: float, eps: float = 1e-5
) -> Float[Tensor, ""]:
    """Mean entropy of the soft assignments minus the entropy of their mean (low: certain, and all codes used).

    p = softmax(-||z - c||^2 / temperature); log(mean p + eps) as in the LFQ family (arXiv 2310.05737, section 3.1).
    """
    bias = codebook.square().sum(1) / -2
    sample, batch = assignment_entropies(z, codebook, bias, scale=2 / temperature, eps=eps)
    return sample - batch


def look_up(codebook: Float[Tensor, "k d"], ids: Int[Tensor, "*n"]) -> Float[Tensor, "*n d"]:
    """Rows of the codebook; the gradient is added up per code. ids may come from torch.inference_mode.

    On CUDA the id -1 (features that are not finite, see `kernels.nearest_code`) reads row 0: the caller learns of it
    from the ids, not from a failure of the device.
    """
    if ids.is_cuda:
        ids = ids.clamp_min(0)
    elif not torch.compiler.is_compiling() and ids.is_inference():
        ids = ids.clone()  # autograd keeps the ids, which it refuses to do with those of inference mode
    return F.embedding(ids, codebook)
