"""Semantic tokenizers: ids of a tower's features (ILLUME, arXiv 2412.06673; X-Omni, arXiv 2507.22058; GLM-Image).

The path of an image: tower -> head -> features [B, h, w, D] -> quantizer -> ids and vectors -> the tower's features
again, and pixels where there is a pixel decoder. Without one, `decode` refuses; `decode_semantic` gives the features.
"""

from dataclasses import dataclass
from typing import Annotated, Any

import torch
from torch import Tensor, nn

from tokenizers_mm._check import fail, require
from tokenizers_mm.config import Choice, Pixels, checked
from tokenizers_mm.decoders.features import ConvFeatureDecoder, TransformerFeatureDecoder
from tokenizers_mm.encoders.plain_vit import PlainViT
from tokenizers_mm.encoders.semantic import SemanticEncoder
from tokenizers_mm.encoders.vision_model import VisionModel
from tokenizers_mm.models.base import ImageTokenizer, from_images, within_memory
from tokenizers_mm.models.vqgan import DECODERS
from tokenizers_mm.quantizers import QUANTIZERS, Quantizer, build_quantizer
from tokenizers_mm.quantizers.base import join_groups, make_streams
from tokenizers_mm.types import UNDISTURBED, Disturbance, ImageCodes, Reconstruction, Stream, expect_codes

TOWERS: dict[str, Any] = {"timm": SemanticEncoder, "transformers": VisionModel, "vit": PlainViT}
"""Vision towers by the `kind` of their configuration: [B, 3, H, W] in [-1, 1] -> [B, h, w, C]; `dim` channels."""

FEATURE_DECODERS: dict[str, Any] = {"conv": ConvFeatureDecoder, "transformer": TransformerFeatureDecoder}
"""Feature decoders: (in_dim, out_dim, config); [B, h, w, D] -> [B, h, w, C]; `last_layer`."""


@dataclass(frozen=True)
class SemanticConfig:
    """Complete configuration of a semantic tokenizer; it has a semantic decoder, a pixel decoder or both.

    ValueError for parts that do not go together.

    cell: pixels per code and side; the tower's grid must have it. image_size: the one (height, width) that the tower
    takes, None for any multiple of `cell`. head: a linear map from the tower's features to the codes' channels; without
    it they must be equal. frozen: the tower does not learn.
    """

    tower: Annotated[Any, Choice(TOWERS, "timm")]
    quantizer: Annotated[Any, Choice(QUANTIZERS, "vq")]
    cell: Pixels
    image_size: tuple[Pixels, Pixels] | None = None
    semantic_decoder: Annotated[Any, Choice(FEATURE_DECODERS, "transformer")] | None = None
    pixel_decoder: Annotated[Any, Choice(DECODERS, "cnn")] | None = None
    head: bool = True
    frozen: bool = True

    def check(self) -> None:
        """Refuse parts that do not go together."""
        some = self.semantic_decoder is not None or self.pixel_decoder is not None
        require(some, "semantic_decoder and pixel_decoder", "one of them, or both", "neither")
        if self.pixel_decoder is not None:
            decoder, dim = self.pixel_decoder, self.quantizer.dim
            require(decoder.factor == self.cell, "pixel_decoder", f"a factor of {self.cell}, the cell", decoder.factor)
            context = getattr(decoder, "context_channels", None)
            require(context in (None, dim), "pixel_decoder.context_channels", f"{dim} or none", context)
        if self.image_size is not None:
            fits = all(side % self.cell == 0 for side in self.image_size)
            require(fits, "image_size", f"multiples of {self.cell}, the cell", self.image_size)


class SemanticTokenizer(ImageTokenizer[ImageCodes]):
    """A tokenizer of the features of a vision tower: one stream `semantic`, one grid; pixels only with a pixel decoder.

    `from_config` builds the parts; `tokenizers_mm.tokenizer_from` makes one of any encoder without training.

    Raises: ValueError for a tower whose channels or grid are not those of the configuration.
    """

    family = "semantic"
    Config = SemanticConfig
    DISTURBANCES = frozenset(["perturb"])
    ONLY_DECODE = frozenset(["pixel_decoder", "semantic_decoder"])

    def __init__(
        self,
        config: SemanticConfig,
        tower: nn.Module,
        quantizer: Quantizer,
        semantic_decoder: nn.Module | None,
        pixel_decoder: nn.Module | None,
    ) -> None:
        super().__init__()
        self.config = config = checked(config)
        self.tower, self.quantizer = tower.requires_grad_(not config.frozen), quantizer
        self.semantic_decoder, self.pixel_decoder = semantic_decoder, pixel_decoder
        quantizer.name_queries("head" if config.head else "tower")
        width, dim = int(tower.dim), quantizer.dim  # type: ignore[arg-type]
        require(config.head or width == dim, "head", f"true, or {width} channels in the codes", dim)
        self.head = nn.Linear(width, dim) if config.head else nn.Identity()
        self.embed = None
        if config.pixel_decoder is not None:
            self.embed = nn.Linear(dim, config.pixel_decoder.in_channels)

    def train(self, mode: bool = True) -> "SemanticTokenizer":
        """Training mode, but for a frozen tower, whose statistics must not move."""
        super().train(mode)
        if self.config.frozen:
            self.tower.eval()
        return self

    @classmethod
    @within_memory
    def from_config(cls, config: SemanticConfig) -> "SemanticTokenizer":
        tower, quantizer = TOWERS[config.tower.kind](config.tower), build_quantizer(config.quantizer)
        features, pixels = config.semantic_decoder, config.pixel_decoder
        return cls(
            config,
            tower,
            quantizer,
            None if features is None else FEATURE_DECODERS[features.kind](quantizer.dim, int(tower.dim), features),
            None if pixels is None else DECODERS[pixels.kind](pixels),
        )

    @property
    def image_size(self) -> tuple[int, int] | None:
        return self.config.image_size

    @property
    def size_multiple(self) -> int:
        return self.config.cell

    def grid(self, height: int, width: int) -> tuple[int, int]:
        """Rows and columns of the codes of an image of height x width pixels; ValueError for a size not taken."""
        self.check_size(height, width)
        return height // self.size_multiple, width // self.size_multiple

    def streams(self, height: int, width: int) -> tuple[Stream, ...]:
        return make_streams("semantic", self.quantizer, [self.grid(height, width)])

    def tower_features(self, x: Tensor) -> Tensor:
        """The tower's features [B, h, w, C], which are quantized, and which the semantic decoder predicts.

        x: images [B, 3, H, W] in [-1, 1]. Raises: ValueError for a tower with another grid than the codes.
        """
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.config.frozen):
            tokens = self.tower(x)
        grid = self.grid(*x.shape[-2:])
        require(tokens.shape[1:3] == grid, "tower", f"features on a grid of {grid}", tuple(tokens.shape[1:3]))
        return tokens

    def decode_semantic(self, vectors: Tensor) -> Tensor:
        """Features [B, h * w, C] in the tower's space from vectors [B, h, w, D]; ValueError without that decoder."""
        if self.semantic_decoder is None:
            fail("vectors", "a tokenizer with a semantic decoder", "one without (its codes give pixels only)")
        return self.semantic_decoder(vectors.to(self.dtype)).flatten(1, 2)

    def decode_pixels(self, vectors: Tensor) -> Tensor:
        """Images [B, 3, H, W], not clamped, from vectors [B, h, w, D]; ValueError without a pixel decoder."""
        if self.pixel_decoder is None or self.embed is None:
            fail("codes", "a tokenizer with a pixel decoder", "a semantic one (decode_semantic gives its features)")
        vectors = vectors.to(self.dtype)
        return self.pixel_decoder(self.embed(vectors).permute(0, 3, 1, 2), vectors.permute(0, 3, 1, 2))

    def quantizers(self) -> dict[str, Quantizer]:
        return {"semantic": self.quantizer}

    @property
    def last_layer(self) -> nn.Parameter:
        """Weight of the last layer before the image, or before the features of a tokenizer without pixels."""
        decoder: Any = self.semantic_decoder if self.pixel_decoder is None else self.pixel_decoder
        return decoder.last_layer

    @property
    def loss_terms(self) -> frozenset[str]:
        pixel = [] if self.pixel_decoder is None else ["pixel"]
        semantic = [] if self.semantic_decoder is None else ["semantic", "target"]
        return frozenset([*pixel, *semantic]) | self.quantizer.loss_terms

    def forward(self, x: Tensor) -> Reconstruction:
        return self.reconstruct(x)

    @from_images
    def reconstruct(self, x: Tensor, disturbance: Disturbance = UNDISTURBED) -> Reconstruction:
        require(disturbance.keep is None, "disturbance.keep", "None (there is one scale)", disturbance.keep)
        target = self.tower_features(x)
        quantized = self.quantizer.quantize(self.head(target))
        vectors, image, semantic = quantized.vectors, None, None
        if self.pixel_decoder is not None:
            perturb = disturbance.perturb
            image = self.decode_pixels(vectors if perturb is None else perturb(vectors))
        if self.semantic_decoder is not None:
            semantic = self.decode_semantic(vectors)
        found = None if semantic is None else target.detach().flatten(1, 2)
        return Reconstruction(image, semantic, found, {"semantic": quantized}, vectors)

    def encode_tensor(self, x: Tensor) -> ImageCodes:
        height, width = x.shape[-2:]
        ids = self.quantizer.quantize(self.head(self.tower_features(x))).ids.flatten(1, 2)
        return ImageCodes(join_groups(ids, self.quantizer.groups), height, width, self.streams(height, width))

    def vectors(self, codes: ImageCodes) -> Tensor:
        expect_codes(codes, ImageCodes)
        return self.quantizer.look_up_joined(codes.ids, self.grid(codes.height, codes.width)).to(self.dtype)

    def decode(self, codes: ImageCodes) -> Tensor:
        return self.decode_pixels(self.vectors(codes))

    @torch.no_grad()
    def features(self, images_or_codes: object) -> Tensor:
        """[B, h * w, C]: the semantic decoder's prediction of the tower's features; the vectors without one."""
        vectors = self.vectors(self.as_codes(images_or_codes))
        return vectors.flatten(1, 2) if self.semantic_decoder is None else self.decode_semantic(vectors)
