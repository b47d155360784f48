"""VQGAN (Esser et al., arXiv 2012.09841) with any quantizer, and optionally a frozen teacher's features to predict.

The path of an image: encoder -> head -> features [B, h, w, D] -> quantizer -> ids and vectors [B, h, w, D] -> embed ->
decoder. The published tokenizers of this shape differ in the quantizer and in options of the two networks: IBQ,
LlamaGen, Chameleon, Emu3.5, Janus, VAR, Infinity, Open-MAGVIT2, Show-o, BSQ-ViT, UniTok.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

import torch
from torch import Tensor, nn

from tokenizers_mm._check import require
from tokenizers_mm.config import Cells, Choice, Length, checked
from tokenizers_mm.decoders.patch import PatchDecoder
from tokenizers_mm.decoders.pixel import PixelDecoder
from tokenizers_mm.decoders.vitamin import ViTaminDecoder
from tokenizers_mm.encoders.patch import PatchEncoder
from tokenizers_mm.encoders.pixel import PixelEncoder
from tokenizers_mm.encoders.semantic import SemanticEncoder, SemanticEncoderConfig
from tokenizers_mm.encoders.vitamin import ViTaminEncoder
from tokenizers_mm.layers.rotary import RotaryTransformer, RotaryTransformerConfig
from tokenizers_mm.models.base import ImageTokenizer, from_images, within_memory
from tokenizers_mm.quantizers import QUANTIZERS, MultiScaleQuantizer, Quantizer, ScalesConfig, build_quantizer
from tokenizers_mm.quantizers.base import join_groups, make_streams
from tokenizers_mm.types import UNDISTURBED, Disturbance, ImageCodes, Reconstruction, Stream, expect_codes

ENCODERS: dict[str, Any] = {"cnn": PixelEncoder, "vit": PatchEncoder, "vitamin": ViTaminEncoder}
"""Pixel encoders by the `kind` of their configuration: [B, 3, H, W] -> [B, C, h, w]; `factor`, `out_channels`."""

DECODERS: dict[str, Any] = {"cnn": PixelDecoder, "vit": PatchDecoder, "vitamin": ViTaminDecoder}
"""Pixel decoders: z [B, C, h, w] and optionally the codes -> [B, 3, H, W]; `factor`, `in_channels`, `last_layer`."""

Scales = Annotated[tuple[tuple[Cells, Cells], ...], Length(1, 256)]


@dataclass(frozen=True)
class VQGANConfig:
    """Complete configuration of a VQGAN; ValueError for parts that do not go together.

    kernel: of the convolutions `head` and `embed` around the quantizer; 0 for none. scales: grids from coarse to fine
    for residual quantization over scales, None for one grid of any size. multiscale: how they are joined. teacher: a
    frozen tower on the grid of the codes, whose features `semantic_decoder` predicts from the codes; both or neither.
    """

    encoder: Annotated[Any, Choice(ENCODERS, "cnn")]
    quantizer: Annotated[Any, Choice(QUANTIZERS, "vq")]
    decoder: Annotated[Any, Choice(DECODERS, "cnn")]
    kernel: Literal[0, 1, 3] = 1
    scales: Scales | None = None
    multiscale: ScalesConfig = field(default_factory=ScalesConfig)
    teacher: SemanticEncoderConfig | None = None
    semantic_decoder: RotaryTransformerConfig | None = None

    @property
    def grid(self) -> tuple[int, int] | None:
        """Rows and columns of the codes where one size of image is taken, else None."""
        transformers = [part.transformer for part in (self.encoder, self.decoder) if part.kind == "vit"]
        fixed = {part.grid for part in transformers} | ({self.scales[-1]} if self.scales else set())
        require(len(fixed) < 2, "scales", "the one grid of encoder and decoder", sorted(fixed))
        return next(iter(fixed), None)

    def check(self) -> None:
        """Refuse parts that do not go together."""
        factor, dim = self.encoder.factor, self.quantizer.dim
        require(self.decoder.factor == factor, "decoder", f"the encoder's factor of {factor}", self.decoder.factor)
        if self.kernel == 0:
            ends = (self.encoder.out_channels, self.decoder.in_channels)
            require(set(ends) == {dim}, "kernel", f"1 or 3, or networks with the quantizer's {dim} channels", ends)
        context = getattr(self.decoder, "context_channels", None)
        require(context in (None, dim), "decoder.context_channels", f"{dim} or none, as in the quantizer", context)
        if (grid := self.grid) is not None and self.scales is not None:
            fits = all(rows <= grid[0] and columns <= grid[1] for rows, columns in self.scales)
            require(fits, "scales", "grids no larger than the last one", self.scales)
        idle = self.scales is None and self.multiscale != ScalesConfig()
        require(not idle, "multiscale", "nothing without scales", "options")
        both = (self.teacher is None) == (self.semantic_decoder is None)
        require(both, "teacher and semantic_decoder", "both or neither", (self.teacher, self.semantic_decoder))


class VQGAN(ImageTokenizer[ImageCodes]):
    """A tokenizer of pixels: encoder, quantizer, decoder; one stream `pixel` of one grid, or of several scales.

    It takes any multiple of `size_multiple`, or one size where the configuration has scales or a grid. `from_config`
    builds the parts. Source: VQGAN (arXiv 2012.09841); scales: VAR (arXiv 2404.02905).
    """

    family = "vqgan"
    Config = VQGANConfig
    DISTURBANCES = frozenset(["keep", "perturb"])
    ONLY_DECODE = frozenset(["decoder", "semantic_decoder"])

    def __init__(
        self,
        config: VQGANConfig,
        encoder: nn.Module,
        quantizer: Quantizer,
        decoder: nn.Module,
        teacher: SemanticEncoder | None = None,
        semantic_decoder: RotaryTransformer | None = None,
    ) -> None:
        super().__init__()
        self.config = config = checked(config)
        self.encoder, self.quantizer, self.decoder = encoder, quantizer, decoder
        quantizer.name_queries("encoder" if config.kernel == 0 else "head")
        self.head = _conv(config.encoder.out_channels, quantizer.dim, config.kernel)
        self.embed = _conv(quantizer.dim, config.decoder.in_channels, config.kernel)
        self.teacher = None if teacher is None else teacher.requires_grad_(False)
        self.semantic_decoder = semantic_decoder

    def train(self, mode: bool = True) -> "VQGAN":
        """Training mode, but for the teacher, whose statistics must not move."""
        super().train(mode)
        if self.teacher is not None:
            self.teacher.eval()
        return self

    @classmethod
    @within_memory
    def from_config(cls, config: VQGANConfig) -> "VQGAN":
        quantizer, teacher, head = build_quantizer(config.quantizer), None, None
        if config.scales is not None:
            quantizer = MultiScaleQuantizer(quantizer, config.scales, config.multiscale)
        if config.teacher is not None and config.semantic_decoder is not None:
            teacher = SemanticEncoder(config.teacher)
            head = RotaryTransformer(quantizer.dim, teacher.dim, config.semantic_decoder)
        encoder, decoder = ENCODERS[config.encoder.kind](config.encoder), DECODERS[config.decoder.kind](config.decoder)
        return cls(config, encoder, quantizer, decoder, teacher, head)

    @property
    def image_size(self) -> tuple[int, int] | None:
        grid, factor = self.config.grid, self.config.encoder.factor
        return None if grid is None else (grid[0] * factor, grid[1] * factor)

    @property
    def size_multiple(self) -> int:
        return self.config.encoder.factor

    def grids(self, height: int, width: int) -> Sequence[tuple[int, int]]:
        """Grids (rows, columns) of the ids of an image of height x width pixels, coarse to fine.

        Raises: ValueError for a size that is not taken.
        """
        self.check_size(height, width)
        return self.config.scales or [(height // self.size_multiple, width // self.size_multiple)]

    def streams(self, height: int, width: int) -> tuple[Stream, ...]:
        return make_streams("pixel", self.quantizer, self.grids(height, width))

    def encode_features(self, x: Tensor) -> Tensor:
        """Features [B, h, w, D] before quantization."""
        return self.head(self.encoder(x)).permute(0, 2, 3, 1)

    def decode_pixels(self, vectors: Tensor) -> Tensor:
        """Image [B, 3, H, W] from vectors [B, h, w, D]."""
        z = vectors.to(self.dtype).permute(0, 3, 1, 2)
        return self.decoder(self.embed(z), z)

    def quantizers(self) -> dict[str, Quantizer]:
        return {"pixel": self.quantizer}

    @property
    def last_layer(self) -> nn.Parameter:
        return self.decoder.last_layer  # type: ignore[return-value]

    @property
    def loss_terms(self) -> frozenset[str]:
        semantic = ["semantic", "target"] if self.teacher is not None else []
        return frozenset(["pixel", *semantic]) | self.quantizer.loss_terms

    def forward(self, x: Tensor) -> Reconstruction:
        return self.reconstruct(x)

    @from_images
    def reconstruct(self, x: Tensor, disturbance: Disturbance = UNDISTURBED) -> Reconstruction:
        z, keep, perturb = self.encode_features(x), disturbance.keep, disturbance.perturb
        if isinstance(self.quantizer, MultiScaleQuantizer):
            quantized = self.quantizer.quantize(z, keep)
        else:
            require(keep is None, "disturbance.keep", "None (there is one scale)", keep)
            quantized = self.quantizer.quantize(z)
        vectors = quantized.vectors
        image = self.decode_pixels(vectors if perturb is None else perturb(vectors))
        semantic = target = None
        if self.teacher is not None and self.semantic_decoder is not None:
            with torch.no_grad():
                target = self.teacher(x)
            expected = f"features on the grid {list(vectors.shape[1:3])} of the codes"
            require(target.shape[1:3] == vectors.shape[1:3], "teacher", expected, list(target.shape[1:3]))
            semantic, target = self.semantic_decoder(vectors.to(self.dtype)).flatten(1, 2), target.flatten(1, 2)
        return Reconstruction(image, semantic, target, {"pixel": quantized}, vectors)

    def encode_tensor(self, x: Tensor) -> ImageCodes:
        height, width = x.shape[-2:]
        ids = self.quantizer.quantize(self.encode_features(x)).ids
        ids = ids if self.config.scales else ids.flatten(1, 2)
        return ImageCodes(join_groups(ids, self.quantizer.groups), height, width, self.streams(height, width))

    def vectors(self, codes: ImageCodes) -> Tensor:
        expect_codes(codes, ImageCodes)
        rows, columns = self.grids(codes.height, codes.width)[-1]
        grid = None if self.config.scales else (rows, columns)
        return self.quantizer.look_up_joined(codes.ids, grid).to(self.dtype)

    def decode(self, codes: ImageCodes) -> Tensor:
        return self.decode_pixels(self.vectors(codes))

    @torch.no_grad()
    def features(self, images_or_codes: object) -> Tensor:
        """[B, h * w, D]: the quantized vectors."""
        return self.vectors(self.as_codes(images_or_codes)).flatten(1, 2)


def _conv(in_channels: int, out_channels: int, kernel: int) -> nn.Module:
    return nn.Conv2d(in_channels, out_channels, kernel, padding=kernel // 2) if kernel else nn.Identity()
