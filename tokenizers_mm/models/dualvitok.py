"""DualViTok (ILLUME+, arXiv 2504.01934): semantic and pixel ids in two streams, at any resolution.

The path of an image: a frozen tower and a head -> semantic features on a coarse grid; a convolutional encoder -> pixel
features on a finer one; one SimVQ codebook for each. The semantic codes, enlarged to the pixel grid and joined with the
pixel codes, make the image; alone they give back the tower's features.
"""

from dataclasses import dataclass, field
from typing import Annotated, Any

import torch
from PIL import Image
from torch import Tensor, nn

from tokenizers_mm._check import require
from tokenizers_mm._images import Fit, fit_image
from tokenizers_mm.config import Choice, checked
from tokenizers_mm.decoders.pixel import PixelDecoder, PixelDecoderConfig
from tokenizers_mm.encoders.dual_semantic import DualSemanticConfig, DualSemanticEncoder
from tokenizers_mm.encoders.pixel import PixelEncoder, PixelEncoderConfig
from tokenizers_mm.functional.multiscale import bicubic_up
from tokenizers_mm.functional.precision import at_least_float32
from tokenizers_mm.layers.rotary import RotaryTransformer, RotaryTransformerConfig
from tokenizers_mm.models.base import ImageInput, ImageTokenizer, from_images, within_memory
from tokenizers_mm.quantizers.base import (
    QUANTIZERS,
    Quantizer,
    build_quantizer,
    join_groups,
    make_streams,
)
from tokenizers_mm.resolutions import Resolutions
from tokenizers_mm.types import UNDISTURBED, Disturbance, ImageCodes, Quantized, Reconstruction, Stream, expect_codes


@dataclass(frozen=True)
class DualViTokConfig:
    """Complete configuration of a DualViTok model; ValueError for parts that do not go together.

    pixel_decoder.context_channels: the channels of both codebooks together; every norm reads the joined codes.
    resolutions: sizes, grids and counts; its cells must be those of the tower and of the pixel encoder.
    """

    semantic_encoder: DualSemanticConfig
    semantic_quantizer: Annotated[Any, Choice(QUANTIZERS, "simvq")]
    semantic_decoder: RotaryTransformerConfig
    pixel_encoder: PixelEncoderConfig
    pixel_quantizer: Annotated[Any, Choice(QUANTIZERS, "simvq")]
    pixel_decoder: PixelDecoderConfig
    resolutions: Resolutions = field(default_factory=Resolutions)

    def check(self) -> None:
        """Refuse parts that do not go together."""
        cells = (self.pixel_encoder.factor, self.semantic_encoder.tower.cell)
        stated = (self.resolutions.pixel_cell, self.resolutions.semantic_cell)
        require(stated == cells, "resolutions", f"cells of {cells[0]} and {cells[1]} pixels", stated)
        factor = self.pixel_decoder.factor
        require(factor == cells[0], "pixel_decoder", f"the encoder's factor of {cells[0]}", f"a factor of {factor}")
        dim, context = self.semantic_quantizer.dim + self.pixel_quantizer.dim, self.pixel_decoder.context_channels
        require(context == dim, "pixel_decoder.context_channels", f"{dim}, as in both codebooks", context)


class DualViTok(ImageTokenizer[ImageCodes]):
    """A tokenizer with two streams, `semantic` (codes of a frozen tower's features) and `pixel`, for any size.

    Sizes are multiples of `size_multiple`; each stream is one grid. `from_config` builds the parts. Source: ILLUME+
    (arXiv 2504.01934).
    """

    family = "dualvitok"
    Config = DualViTokConfig
    DISTURBANCES = frozenset(["perturb"])
    ONLY_DECODE = frozenset(["semantic_decoder", "pixel_decoder"])

    def __init__(
        self,
        config: DualViTokConfig,
        semantic_encoder: DualSemanticEncoder,
        pixel_encoder: PixelEncoder,
        semantic_quantizer: Quantizer,
        pixel_quantizer: Quantizer,
        semantic_decoder: RotaryTransformer,
        pixel_decoder: PixelDecoder,
    ) -> None:
        super().__init__()
        config = checked(config)
        self.config, self.resolutions = config, config.resolutions
        self.semantic_encoder, self.pixel_encoder = semantic_encoder, pixel_encoder
        self.semantic_quantizer, self.pixel_quantizer = semantic_quantizer, pixel_quantizer
        semantic_quantizer.name_queries("semantic_encoder")
        pixel_quantizer.name_queries("pixel_head")
        self.semantic_decoder, self.pixel_decoder = semantic_decoder, pixel_decoder
        dim = semantic_quantizer.dim + pixel_quantizer.dim
        self.pixel_head = nn.Linear(config.pixel_encoder.out_channels, pixel_quantizer.dim)
        self.pixel_embed = nn.Linear(dim, config.pixel_decoder.in_channels)

    @classmethod
    @within_memory
    def from_config(cls, config: DualViTokConfig) -> "DualViTok":
        semantic_dim, target_dim = config.semantic_quantizer.dim, config.semantic_encoder.tower.out_dim
        return cls(
            config,
            DualSemanticEncoder(config.semantic_encoder, semantic_dim),
            PixelEncoder(config.pixel_encoder),
            build_quantizer(config.semantic_quantizer),
            build_quantizer(config.pixel_quantizer),
            RotaryTransformer(semantic_dim, target_dim, config.semantic_decoder),
            PixelDecoder(config.pixel_decoder),
        )

    @property
    def image_size(self) -> None:
        return None

    @property
    def size_multiple(self) -> int:
        return self.resolutions.pixel_cell

    def streams(self, height: int, width: int) -> tuple[Stream, ...]:
        self.check_size(height, width)
        semantic = make_streams("semantic", self.semantic_quantizer, [self.resolutions.semantic_grid(height, width)])
        return semantic + make_streams("pixel", self.pixel_quantizer, [self.resolutions.pixel_grid(height, width)])

    def fit_picture(self, picture: Image.Image, fit: Fit) -> Image.Image:
        """As the base class says; "resize" also keeps the area in the bounds of `config.resolutions`."""
        if fit == "resize":
            return fit_image(picture, *self.resolutions.smart_size(picture.height, picture.width), fit)
        return super().fit_picture(picture, fit)

    def encode_features(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Before quantization: semantic [B, h', w', D], pixel [B, h, w, E], and the target [B, h', w', C]."""
        semantic, target = self.semantic_encoder(x, self.resolutions.tower_size(*x.shape[-2:]))
        return semantic, self.pixel_head(self.pixel_encoder(x).permute(0, 2, 3, 1)), target

    def quantize(self, semantic: Tensor, pixel: Tensor) -> dict[str, Quantized]:
        """Semantic [B, h', w', D] and pixel features [B, h, w, E] quantized, by the name of the stream."""
        return {"semantic": self.semantic_quantizer.quantize(semantic), "pixel": self.pixel_quantizer.quantize(pixel)}

    def merge(self, semantic: Tensor, pixel: Tensor) -> Tensor:
        """Semantic [B, h', w', D] and pixel vectors [B, h, w, E] joined on the pixel grid, [B, h, w, D + E]."""
        rows, columns = pixel.shape[1:3]
        return torch.cat([bicubic_up(at_least_float32(semantic), (rows, columns)).to(pixel.dtype), pixel], dim=-1)

    def decode_pixels(self, vectors: Tensor) -> Tensor:
        """Image [B, 3, H, W] from joined vectors [B, h, w, D + E]."""
        vectors = vectors.to(self.dtype)
        return self.pixel_decoder(self.pixel_embed(vectors).permute(0, 3, 1, 2), vectors.permute(0, 3, 1, 2))

    def decode_semantic(self, vectors: Tensor) -> Tensor:
        """Features [B, h' * w', C] in the tower's space from semantic vectors [B, h', w', D]."""
        return self.semantic_decoder(vectors.to(self.dtype)).flatten(1, 2)

    def quantizers(self) -> dict[str, Quantizer]:
        return {"semantic": self.semantic_quantizer, "pixel": self.pixel_quantizer}

    @property
    def last_layer(self) -> nn.Parameter:
        return self.pixel_decoder.last_layer

    @property
    def loss_terms(self) -> frozenset[str]:
        terms = self.semantic_quantizer.loss_terms | self.pixel_quantizer.loss_terms
        return frozenset(["pixel", "semantic", "target"]) | terms

    def forward(self, x: Tensor) -> Reconstruction:
        return self.reconstruct(x)

    @from_images
    def reconstruct(self, x: Tensor, disturbance: Disturbance = UNDISTURBED) -> Reconstruction:
        require(disturbance.keep is None, "disturbance.keep", "None (DualViTok has one scale)", disturbance.keep)
        perturb = disturbance.perturb
        semantic, pixel, target = self.encode_features(x)
        quantized = self.quantize(semantic, pixel)
        semantic, pixel = quantized["semantic"].vectors, quantized["pixel"].vectors
        vectors = self.merge(semantic, pixel)
        image = self.decode_pixels(vectors if perturb is None else self.merge(semantic, perturb(pixel)))
        return Reconstruction(image, self.decode_semantic(semantic), target.flatten(1, 2), quantized, vectors)

    def encode_tensor(self, x: Tensor) -> ImageCodes:
        semantic, pixel, _ = self.encode_features(x)
        quantized = self.quantize(semantic, pixel)
        height, width = x.shape[-2:]
        groups = {name: quantizer.groups for name, quantizer in self.quantizers().items()}
        ids = torch.cat([join_groups(part.ids.flatten(1, 2), groups[name]) for name, part in quantized.items()], dim=1)
        return ImageCodes(ids, height, width, self.streams(height, width))

    def stream_vectors(self, codes: ImageCodes) -> tuple[Tensor, Tensor]:
        """The codes of each stream on its own grid: semantic [B, h', w', D] and pixel [B, h, w, E]."""
        expect_codes(codes, ImageCodes)
        grids = (
            self.resolutions.semantic_grid(codes.height, codes.width),
            self.resolutions.pixel_grid(codes.height, codes.width),
        )
        quantizers = (self.semantic_quantizer, self.pixel_quantizer)
        counts = [quantizer.groups * grid[0] * grid[1] for quantizer, grid in zip(quantizers, grids, strict=True)]
        semantic, pixel = (
            quantizer.look_up_joined(ids, grid)
            for quantizer, ids, grid in zip(quantizers, codes.ids.split(counts, dim=1), grids, strict=True)
        )
        return semantic, pixel

    def vectors(self, codes: ImageCodes) -> Tensor:
        return self.merge(*self.stream_vectors(codes)).to(self.dtype)

    def decode(self, codes: ImageCodes) -> Tensor:
        return self.decode_pixels(self.vectors(codes))

    @torch.no_grad()
    def features(self, images_or_codes: object) -> Tensor:
        """[B, h * w, D + E]: the joined codes of both streams on the pixel grid."""
        return self.vectors(self.as_codes(images_or_codes)).flatten(1, 2)

    @torch.no_grad()
    def stream_features(self, images: ImageInput) -> dict[str, Tensor]:
        """Inputs of the paper's language model, by stream, before any quantizer.

        Returns: "semantic" [B, h', w', C], the tower's tokens as they are, and "pixel" [B, h, w, D], D channels of the
        pixel encoder.
        Raises: ValueError for images of several sizes.
        """
        parts: dict[str, list[Tensor]] = {"semantic": [], "pixel": []}
        for x in self.prepared_parts(images):
            parts["semantic"].append(self.semantic_encoder.tower(x, self.resolutions.tower_size(*x.shape[-2:])))
            parts["pixel"].append(self.pixel_encoder(x).permute(0, 2, 3, 1))
        sizes = sorted({(part.shape[1], part.shape[2]) for part in parts["pixel"]})
        require(len(sizes) == 1, "images", "images of one size", f"sizes with grids {sizes}")
        return {name: torch.cat(found) for name, found in parts.items()}
