"""TokenFlow (arXiv 2412.03069): a semantic and a pixel codebook, one shared index, many scales.

The path of an image: both encoders -> features [B, h, w, D] (semantic channels first) -> multi-scale quantizer ->
ids [B, L] and vectors [B, h, w, D] -> both decoders.
"""

from dataclasses import dataclass
from typing import Annotated, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tokenizers_mm._check import require
from tokenizers_mm.config import Cells, Choice, Length, Pixels, Width, checked
from tokenizers_mm.decoders.pixel import PixelDecoder, PixelDecoderConfig
from tokenizers_mm.decoders.semantic import SemanticDecoder, SemanticDecoderConfig
from tokenizers_mm.encoders.pixel import PixelEncoder, PixelEncoderConfig
from tokenizers_mm.encoders.semantic import SemanticEncoder, SemanticEncoderConfig
from tokenizers_mm.models.base import ImageTokenizer, from_images, within_memory
from tokenizers_mm.quantizers.base import QUANTIZERS, build_quantizer, join_groups, make_streams
from tokenizers_mm.quantizers.multiscale import MultiScaleQuantizer
from tokenizers_mm.quantizers.shared_index import SharedIndexConfig
from tokenizers_mm.types import UNDISTURBED, Disturbance, ImageCodes, Reconstruction, Stream, expect_codes


@dataclass(frozen=True)
class TokenFlowConfig:
    """Complete configuration of a TokenFlow model; ValueError for parts that do not go together.

    image_size: (height, width) of the images. scales: grids from coarse to fine; the last one is the grid of both
    encoders; one entry gives a single-scale tokenizer. quantizer: of any kind. pixel_size: what the pixel encoder and
    decoder work at, where it differs from image_size (resized bicubically both ways). dims: semantic and pixel channels
    of the codes; None for a shared index, which states them.
    """

    image_size: tuple[Pixels, Pixels]
    scales: Annotated[tuple[tuple[Cells, Cells], ...], Length(1, 256)]
    quantizer: Annotated[Any, Choice(QUANTIZERS, "shared_index")]
    semantic_encoder: SemanticEncoderConfig
    pixel_encoder: PixelEncoderConfig
    semantic_decoder: SemanticDecoderConfig
    pixel_decoder: PixelDecoderConfig
    pixel_size: tuple[Pixels, Pixels] | None = None
    dims: tuple[Width, Width] | None = None

    @property
    def parts(self) -> tuple[int, int]:
        """Semantic and pixel channels of the codes; ValueError where the configuration does not say them once."""
        if isinstance(self.quantizer, SharedIndexConfig):
            require(len(self.quantizer.dims) == 2, "quantizer.dims", "semantic and pixel channels", self.quantizer.dims)
            semantic, pixel = self.quantizer.dims
            require(self.dims is None, "dims", "nothing beside quantizer.dims", self.dims)
            return semantic, pixel
        dims = self.dims or (0, 0)
        expected = f"semantic and pixel channels that add up to the quantizer's {self.quantizer.dim}"
        require(sum(dims) == self.quantizer.dim, "dims", expected, self.dims)
        return dims

    def check(self) -> None:
        """Refuse parts that do not go together."""
        _, grid = self.parts, self.scales[-1]
        fits = all(rows <= grid[0] and columns <= grid[1] for rows, columns in self.scales)
        require(fits, "scales", "grids no larger than the last one", self.scales)
        decoder_grid = self.semantic_decoder.grid
        require(decoder_grid == grid, "semantic_decoder.grid", f"{grid}, the last scale", decoder_grid)
        size = self.pixel_size or self.image_size
        for name, part in (("pixel_encoder", self.pixel_encoder), ("pixel_decoder", self.pixel_decoder)):
            sides = (grid[0] * part.factor, grid[1] * part.factor)
            require(sides == size, name, f"a factor that makes the last scale of {size} pixels", f"one for {sides}")


class TokenFlow(ImageTokenizer[ImageCodes]):
    """A tokenizer with one index into a semantic and a pixel codebook: one stream `shared`, several scales, one size.

    `from_config` builds the parts. Source: TokenFlow (arXiv 2412.03069).
    """

    family = "tokenflow"
    Config = TokenFlowConfig
    DISTURBANCES = frozenset(["keep"])
    ONLY_DECODE = frozenset(["semantic_decoder", "pixel_decoder"])

    def __init__(
        self,
        config: TokenFlowConfig,
        semantic_encoder: SemanticEncoder,
        pixel_encoder: PixelEncoder,
        quantizer: MultiScaleQuantizer,
        semantic_decoder: SemanticDecoder,
        pixel_decoder: PixelDecoder,
    ) -> None:
        super().__init__()
        self.config = config = checked(config)
        self.semantic_encoder, self.pixel_encoder = semantic_encoder, pixel_encoder
        self.quantizer = quantizer
        quantizer.name_queries("semantic_head", "pixel_head")
        self.semantic_decoder, self.pixel_decoder = semantic_decoder, pixel_decoder
        self.dims = semantic_dim, pixel_dim = config.parts
        width = semantic_encoder.dim
        self.semantic_head = nn.Sequential(nn.Linear(width, width), nn.Tanh(), nn.Linear(width, semantic_dim))
        self.pixel_head = nn.Linear(config.pixel_encoder.out_channels, pixel_dim)
        self.pixel_embed = nn.Linear(pixel_dim, config.pixel_decoder.in_channels)

    @classmethod
    @within_memory
    def from_config(cls, config: TokenFlowConfig) -> "TokenFlow":
        return cls(
            config,
            SemanticEncoder(config.semantic_encoder),
            PixelEncoder(config.pixel_encoder),
            MultiScaleQuantizer(build_quantizer(config.quantizer), config.scales),
            SemanticDecoder(config.parts[0], config.semantic_decoder),
            PixelDecoder(config.pixel_decoder),
        )

    @property
    def image_size(self) -> tuple[int, int]:
        return self.config.image_size

    @property
    def size_multiple(self) -> int:
        return 1 if self.config.pixel_size else self.pixel_encoder.factor

    def streams(self, height: int, width: int) -> tuple[Stream, ...]:
        self.check_size(height, width)
        return make_streams("shared", self.quantizer, self.quantizer.grids)

    def encode_features(self, x: Tensor) -> Tensor:
        """Features [B, h, w, D] of images x [B, 3, H, W] before quantization, semantic channels first.

        Raises: ValueError for encoders with different grids.
        """
        semantic = self.semantic_head(self.semantic_encoder(x))
        pixels = _resize(x, self.config.pixel_size)
        pixel = self.pixel_head(self.pixel_encoder(pixels).permute(0, 2, 3, 1))
        require(
            semantic.shape[:3] == pixel.shape[:3],
            "config",
            "equal grids of both encoders",
            f"{semantic.shape[1:3]}, {pixel.shape[1:3]}",
        )
        return torch.cat([semantic, pixel], dim=-1)

    def decode_pixels(self, vectors: Tensor) -> Tensor:
        """Images [B, 3, H, W], not clamped, from vectors [B, h, w, D]."""
        pixel = self.pixel_embed(vectors[..., self.dims[0] :]).permute(0, 3, 1, 2)
        image = self.pixel_decoder(pixel)
        return _resize(image, self.config.image_size if self.config.pixel_size else None)

    def decode_semantic(self, vectors: Tensor) -> Tensor:
        """Features [B, h * w, C] in the teacher's space from vectors [B, h, w, D]."""
        return self.semantic_decoder(vectors[..., : self.dims[0]])

    def quantizers(self) -> dict[str, MultiScaleQuantizer]:
        return {"shared": self.quantizer}

    @property
    def last_layer(self) -> nn.Parameter:
        return self.pixel_decoder.last_layer

    @property
    def loss_terms(self) -> frozenset[str]:
        return frozenset(["pixel", "semantic"]) | self.quantizer.loss_terms

    def forward(self, x: Tensor) -> Reconstruction:
        return self.reconstruct(x)

    @from_images
    def reconstruct(self, x: Tensor, disturbance: Disturbance = UNDISTURBED) -> Reconstruction:
        require(disturbance.perturb is None, "disturbance.perturb", "None (no pixel stream here)", "a function")
        quantized = self.quantizer.quantize(self.encode_features(x), disturbance.keep)
        image, semantic = self.decode_pixels(quantized.vectors), self.decode_semantic(quantized.vectors)
        return Reconstruction(image, semantic, None, {"shared": quantized}, quantized.vectors)

    def encode_tensor(self, x: Tensor) -> ImageCodes:
        ids = join_groups(self.quantizer.quantize(self.encode_features(x)).ids, self.quantizer.groups)
        height, width = x.shape[-2:]
        return ImageCodes(ids, height, width, self.streams(height, width))

    def vectors(self, codes: ImageCodes) -> Tensor:
        expect_codes(codes, ImageCodes)
        return self.quantizer.look_up_joined(codes.ids).to(self.dtype)

    def decode(self, codes: ImageCodes) -> Tensor:
        return self.decode_pixels(self.vectors(codes))

    @torch.no_grad()
    def features(self, images_or_codes: object) -> Tensor:
        """[B, h * w, D]: the sum over all scales of the upsampled codes, both parts (section 3.4 of the paper)."""
        return self.vectors(self.as_codes(images_or_codes)).flatten(1, 2)


def _resize(x: Tensor, size: tuple[int, int] | None) -> Tensor:
    """Bicubic, without antialiasing."""
    return x if size is None else F.interpolate(x, size=size, mode="bicubic", align_corners=False)
