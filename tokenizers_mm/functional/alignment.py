"""Terms that give codes a meaning: distillation from a teacher, and image-caption contrast."""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor


def cosine_distance(predicted: Float[Tensor, "*n d"], target: Float[Tensor, "*n d"]) -> Float[Tensor, ""]:
    """Mean of 1 - cosine similarity over all tokens (TokenFlow's released code; BEiT v2, arXiv 2208.06366, eq. 4)."""
    return (1 - F.cosine_similarity(predicted, target, dim=-1)).mean()


def contrastive(
    images: Float[Tensor, "b d"], texts: Float[Tensor, "t d"], log_scale: Float[Tensor, ""]
) -> Float[Tensor, ""]:
    """Symmetric cross-entropy of the cosine similarities times exp(log_scale), at most 100 (CLIP, arXiv 2103.00020).

    Text i belongs to image i; texts beyond the number of images are further negatives.
    """
    scale = log_scale.exp().clamp(max=100.0)
    logits = scale * F.normalize(images, dim=-1) @ F.normalize(texts, dim=-1).T
    target = torch.arange(len(logits), device=logits.device)
    return 0.5 * (F.cross_entropy(logits, target) + F.cross_entropy(logits.T[: len(images)], target))
