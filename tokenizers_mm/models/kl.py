"""The KL-regularised autoencoder whose latents MAR models (Rombach et al., LDM, arXiv 2112.10752, section 3.1)."""

from dataclasses import dataclass, field

from torch import Tensor, nn

from tokenizers_mm._check import require
from tokenizers_mm.config import checked
from tokenizers_mm.decoders.pixel import PixelDecoder, PixelDecoderConfig
from tokenizers_mm.encoders.pixel import PixelEncoder, PixelEncoderConfig
from tokenizers_mm.functional.gaussian import DiagonalGaussian


@dataclass(frozen=True)
class KLConfig:
    """Both networks; the encoder's channels hold means and log-variances, twice those that the decoder takes."""

    encoder: PixelEncoderConfig = field(default_factory=lambda: PixelEncoderConfig(out_channels=32))
    decoder: PixelDecoderConfig = field(default_factory=lambda: PixelDecoderConfig(in_channels=16, attention_levels=()))

    def check(self) -> None:
        """Refuse two networks that do not go together."""
        moments, dim = self.encoder.out_channels, self.decoder.in_channels
        require(moments == 2 * dim, "encoder.out_channels", f"2 * decoder.in_channels = {2 * dim}", moments)
        factor = self.encoder.factor
        require(self.decoder.factor == factor, "decoder", f"the encoder's factor of {factor}", self.decoder.factor)


class KLAutoencoder(nn.Module):
    """Images [B, 3, H, W] in [-1, 1] to a Gaussian over latents [B, D, h, w], and latents back to images."""

    def __init__(self, config: KLConfig) -> None:
        super().__init__()
        self.config = config = checked(config)
        moments, dim = config.encoder.out_channels, config.decoder.in_channels
        self.encoder = PixelEncoder(config.encoder)
        self.quant = nn.Conv2d(moments, moments, 1)
        self.post_quant = nn.Conv2d(dim, dim, 1)
        self.decoder = PixelDecoder(config.decoder)

    @property
    def factor(self) -> int:
        """Pixels per latent along each axis."""
        return self.encoder.factor

    @property
    def dim(self) -> int:
        """Channels of a latent."""
        return self.config.decoder.in_channels

    def posterior(self, x: Tensor) -> DiagonalGaussian:
        """q(latents | image); its mean is what inference uses."""
        return DiagonalGaussian.from_moments(self.quant(self.encoder(x)))

    def decode(self, latents: Tensor) -> Tensor:
        """Images from unscaled latents, not clamped."""
        return self.decoder(self.post_quant(latents))
