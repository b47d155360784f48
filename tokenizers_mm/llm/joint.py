"""Tuning of an image tokenizer together with the language model that reads its codes, through captions.

Source: ETT, End-to-End Vision Tokenizer Tuning (arXiv 2505.10562), section 3.2. The caption's gradient goes from the
language model through the projector to the quantized vectors, and from there as each quantizer lets it:

    quantizer                       what gets the caption's gradient                what does not
    VQ, shared index (TokenFlow)    the features: encoders and heads before it      codebooks
    SimVQ (DualViTok)               the same, straight through or by rotation       the transform; `frozen` is a buffer
    multi-scale, residual           the features, as the quantizer inside           as the quantizer inside
    FSQ                             the features, project_in and project_out        nothing: all of it

Decoders, and the maps from codes to decoders, never get it. In TokenFlow that leaves `semantic_encoder`,
`pixel_encoder`, `semantic_head` and `pixel_head`; in DualViTok `semantic_encoder.head`, `pixel_encoder` and
`pixel_head` (its tower is frozen). Codebooks move by the tokenizer's own objective alone. In ETT all rows of the
codebook move too, because its quantizer (IBQ) passes gradients through the assignments; none here does that.
"""

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from tokenizers_mm._check import require
from tokenizers_mm.llm.batch import Batch, ImageFeatures, Segment, pad_rows
from tokenizers_mm.llm.loss import next_token_loss
from tokenizers_mm.llm.processor import MultimodalProcessor
from tokenizers_mm.llm.projector import FeatureProjector, embed
from tokenizers_mm.models.base import ImageTokenizer
from tokenizers_mm.types import Reconstruction


def read_codes(tokenizer: ImageTokenizer[Any], images: Tensor, output: Reconstruction | None = None) -> Tensor:
    """Inputs of the language model for images [B, 3, H, W]: their codes as vectors [B, T, C].

    output: the tokenizer's forward pass of the same images; the vectors are then differentiable. Without one they are
    `tokenizer.features(images)`, without gradients and without the decoders. The values are equal but for rounding.
    """
    return tokenizer.features(images) if output is None else output.vectors.flatten(1, 2)


def caption_batch(
    processor: MultimodalProcessor, vectors: Tensor, size: tuple[int, int], captions: Sequence[str], prompt: str = ""
) -> Batch | None:
    """Rows of image, prompt, caption, of which only the caption and the end are labels; differentiable in `vectors`.

    vectors: [B, T, C] of images of this (height, width). Images with an empty caption are left out; None when all are.
    """
    require(len(vectors) == len(captions), "captions", f"{len(vectors)}, one for each image", f"{len(captions)}")
    rows = []
    for shown, caption in zip(vectors, captions, strict=True):
        if caption:
            image = Segment(ImageFeatures((shown,), *size), learn=False, as_features=True)
            rows.append([image, *([Segment(prompt, learn=False)] if prompt else []), caption])
    return pad_rows(processor.rows(rows), processor.pad) if rows else None


def num_labels(processor: MultimodalProcessor, captions: Sequence[str]) -> int:
    """Number of tokens that `caption_loss` of the `caption_batch` of these captions is a mean over."""
    text = processor.text_tokenizer
    end = int(processor.eos is not None)
    return sum(len(text(caption, add_special_tokens=False)["input_ids"]) + end for caption in captions if caption)


def caption_loss(model: Any, projector: FeatureProjector, batch: Batch) -> Tensor:
    """L_cap: the mean over all label tokens of -log P(token | projected codes, tokens before it)."""
    return next_token_loss(model, embed(model, batch, projector))


def joint_loss(caption: Tensor, tokenizer: Tensor, alpha: float) -> Tensor:
    """L = L_cap + alpha * L_vq; L_vq is the tokenizer's own objective, already weighted within."""
    return caption + alpha * tokenizer
