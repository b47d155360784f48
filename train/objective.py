"""The terms of the generator's loss, by name and unweighted."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from tokenizers_mm.data.sources import Batch
from tokenizers_mm.encoders.semantic import SemanticEncoder
from tokenizers_mm.functional.adversarial import hinge_generator, non_saturating_generator
from tokenizers_mm.functional.alignment import cosine_distance
from tokenizers_mm.losses.captions import CaptionContrast
from tokenizers_mm.losses.perceptual import LPIPS
from tokenizers_mm.types import Reconstruction

from .config import LossConfig


@dataclass
class Objective:
    """What the terms need besides the tokenizer: frozen networks, and the text tower that learns with it."""

    config: LossConfig
    perceptual: LPIPS | None = None
    teacher: SemanticEncoder | None = None
    captions: CaptionContrast | None = None

    def terms(self, x: Tensor, output: Reconstruction, batch: Batch) -> dict[str, Tensor]:
        """All terms with a weight but the adversarial one, each a scalar in float32."""
        weights = self.config.weights
        image = output.image.float()
        terms: dict[str, Tensor] = {}
        if weights.pixel:
            terms["pixel"] = F.l1_loss(image, x) if self.config.pixel == "l1" else F.mse_loss(image, x)
        if weights.perceptual and self.perceptual is not None:
            terms["perceptual"] = self.perceptual(x, image).mean()
        if weights.semantic and self.config.semantic != "none":
            terms["semantic"] = self._semantic(x, output, batch)
        quantized = [q.terms for q in output.quantized.values() if q.terms is not None]
        for name in ("codebook", "commitment", "entropy"):
            if getattr(weights, name):
                terms[name] = torch.stack([getattr(t, name) for t in quantized]).sum()
        return terms

    def _semantic(self, x: Tensor, output: Reconstruction, batch: Batch) -> Tensor:
        semantic = output.semantic.float()
        if self.config.semantic == "captions":
            assert self.captions is not None
            return self.captions(semantic, batch.captions)
        if self.config.semantic == "target":
            if output.target is None:
                raise ValueError("config.loss.semantic: expected 'teacher' or 'captions' for this model, got 'target'")
            return cosine_distance(semantic, output.target.float())
        assert self.teacher is not None
        with torch.no_grad():
            target = self.teacher(x).flatten(1, 2)
        return cosine_distance(semantic, target.float())

    def adversarial(self, logits: Tensor) -> Tensor:
        """The generator's term from the discriminator's logits of the reconstructions."""
        loss = hinge_generator if self.config.gan == "hinge" else non_saturating_generator
        return loss(logits.float())
