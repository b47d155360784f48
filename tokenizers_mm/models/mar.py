"""MAR (arXiv 2406.11838): continuous tokens that one encoder understands and generates (Harmon, arXiv 2503.21979).

The path of an image: KL autoencoder -> scaled latents [B, h * w, D], row-major -> MAR encoder -> what a language model
reads. The path back: tokens from `mar_sampling` (or any latents) -> KL decoder.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any

import torch
from torch import Tensor

from tokenizers_mm._check import require, require_finite
from tokenizers_mm.config import Range, checked
from tokenizers_mm.decoders.diffusion import TokenDenoiser, TokenDenoiserConfig
from tokenizers_mm.decoders.mar import MARDecoder, MARDecoderConfig
from tokenizers_mm.encoders.mar import MAREncoder, MAREncoderConfig
from tokenizers_mm.functional.diffusion import TRAIN_STEPS, add_noise, diffusion_terms, schedule
from tokenizers_mm.functional.masking import masked_mean, random_mask
from tokenizers_mm.functional.precision import at_least_float32
from tokenizers_mm.models.base import ImageTokenizer, from_images, within_memory
from tokenizers_mm.models.kl import KLAutoencoder, KLConfig
from tokenizers_mm.quantizers.base import Quantizer
from tokenizers_mm.types import UNDISTURBED, Disturbance, ImageLatents, Reconstruction, Stream, expect_codes

Grid = tuple[int, int]

WITHOUT_DECAY = ("denoiser.",)
"""Prefixes of parameters that take no weight decay, beside all biases and all others of one axis."""


@dataclass(frozen=True)
class MARConfig:
    """Complete configuration of a MAR model; the defaults are MAR-B with the KL-16 autoencoder.

    latent_scale: what latents are multiplied by, so that their variance is about 1.
    noise_repeats: draws of step and noise for every token in training (`diffusion_batch_mul`).
    """

    autoencoder: KLConfig = field(default_factory=KLConfig)
    encoder: MAREncoderConfig = field(default_factory=MAREncoderConfig)
    decoder: MARDecoderConfig = field(default_factory=MARDecoderConfig)
    denoiser: TokenDenoiserConfig = field(default_factory=TokenDenoiserConfig)
    latent_scale: Annotated[float, Range(0, 1e6, low_open=True)] = 0.2325
    noise_repeats: Annotated[int, Range(1, 1024)] = 4

    def check(self) -> None:
        """Refuse parts that do not go together."""
        first, second = self.encoder, self.decoder
        _same("token_dim", self.autoencoder.decoder.in_channels, first.token_dim, self.denoiser.token_dim)
        _same("grid", first.grid, second.grid)
        _same("num_buffers", first.num_buffers, second.num_buffers)
        _same("encoder_width", first.width, second.encoder_width)
        _same("condition_dim", second.width, self.denoiser.condition_dim)


@dataclass(frozen=True)
class MARDraws:
    """The chance in one training step.

    mask: bool [B, L], True for hidden tokens. steps: int64 [R * B * L], noise: float [R * B * L, D], for R repeats of
    all tokens, one whole repeat after the other.
    """

    mask: Tensor
    steps: Tensor
    noise: Tensor


@dataclass(frozen=True)
class MARTerms:
    """Unweighted scalar terms over hidden tokens: `noise` (mean squared error) and `bound` (in bits per dimension).

    MAR's loss is their sum.
    """

    noise: Tensor
    bound: Tensor


class MAR(ImageTokenizer[ImageLatents]):
    """The composed tokenizer; `from_config` builds the parts."""

    family = "mar"
    Config = MARConfig

    def __init__(
        self,
        config: MARConfig,
        autoencoder: KLAutoencoder,
        encoder: MAREncoder,
        decoder: MARDecoder,
        denoiser: TokenDenoiser,
    ) -> None:
        super().__init__()
        self.config = checked(config)
        self.autoencoder, self.encoder, self.decoder, self.denoiser = autoencoder, encoder, decoder, denoiser

    @classmethod
    @within_memory
    def from_config(cls, config: MARConfig) -> "MAR":
        return cls(
            config,
            KLAutoencoder(config.autoencoder),
            MAREncoder(config.encoder),
            MARDecoder(config.decoder),
            TokenDenoiser(config.denoiser),
        )

    @property
    def image_size(self) -> None:
        return None

    @property
    def size_multiple(self) -> int:
        return self.autoencoder.factor

    @property
    def num_buffers(self) -> int:
        """Slots before the tokens in `features`."""
        return self.config.encoder.num_buffers

    @property
    def feature_dim(self) -> int:
        """Channels C of `features`, those of the encoder."""
        return self.config.encoder.width

    def streams(self, height: int, width: int) -> tuple[Stream, ...]:
        self.check_size(height, width)
        return ()

    def grid(self, height: int, width: int) -> Grid:
        """Rows and columns of the latents of an image of height x width pixels; ValueError for a size not taken."""
        self.check_size(height, width)
        return height // self.size_multiple, width // self.size_multiple

    def encode_tensor(self, x: Tensor, noise: Tensor | None = None) -> ImageLatents:
        """The mean of the posterior, scaled; with standard normal `noise` [B, D, h, w] a sample (MAR's training)."""
        posterior = self.autoencoder.posterior(x)
        latents = posterior.mean if noise is None else posterior.sample(noise)
        height, width = x.shape[-2:]
        values = (latents * self.config.latent_scale).flatten(2).transpose(1, 2)
        if not torch.compiler.is_compiling():  # values cannot be looked at inside a graph
            require_finite("autoencoder", "latents", values)
        return ImageLatents(values, height, width, self.grid(height, width))

    def latents(self, values: Tensor, grid: Grid) -> ImageLatents:
        """Tokens [B, h * w, D] of a grid, for example generated ones, in the form that `decode` takes."""
        factor = self.size_multiple
        return ImageLatents(values, grid[0] * factor, grid[1] * factor, grid)

    def vectors(self, codes: ImageLatents) -> Tensor:
        """The scaled latents themselves, [B, h, w, D]."""
        expect_codes(codes, ImageLatents)
        return codes.values.unflatten(1, codes.grid)

    def decode(self, codes: ImageLatents) -> Tensor:
        return self.autoencoder.decode(self.vectors(codes).permute(0, 3, 1, 2) / self.config.latent_scale)

    @torch.no_grad()
    def features(self, images_or_codes: object) -> Tensor:
        """[B, h * w + num_buffers, C]: row-major tokens, then buffers, from the MAR encoder with nothing hidden.

        This is the order in which a language model reads them; the encoder itself puts the buffers first.
        """
        codes = self.as_codes(images_or_codes)
        return buffers_last(self.encoder(codes.values, codes.grid), self.num_buffers)

    @from_images
    def reconstruct(self, x: Tensor, disturbance: Disturbance = UNDISTURBED) -> Reconstruction:
        """The autoencoder alone: images [B, 3, H, W] decoded from the mean of the posterior.

        Raises: ValueError for a disturbance: there are no codes to disturb.
        """
        require(disturbance == UNDISTURBED, "disturbance", "none (MAR has no codes)", disturbance)
        latents = self.encode_tensor(x)
        return Reconstruction(self.decode(latents), None, None, {}, self.vectors(latents))

    def quantizers(self) -> dict[str, Quantizer]:
        return {}

    @property
    def last_layer(self) -> torch.nn.Parameter:
        return self.autoencoder.decoder.last_layer

    def forward(self, tokens: Tensor, grid: Grid, draws: MARDraws, condition: Tensor | None = None) -> MARTerms:
        """The terms of MAR's loss for tokens [B, h * w, D]; `condition` as the encoder takes it."""
        encoded = self.encoder(tokens, grid, draws.mask, condition)
        return self.terms(self.decoder(encoded, grid, draws.mask), tokens, draws)

    def draw(
        self,
        batch: int,
        length: int,
        generator: torch.Generator | None = None,
        rows: Sequence[torch.Generator] | None = None,
    ) -> MARDraws:
        """Random masks, steps and noise for one training step, drawn on the CPU.

        rows: a generator for each sample; then `generator` only says how many tokens are hidden, and what is drawn for
        a sample does not depend on what else is in the batch (several processes draw as one).
        """
        repeats, dim = self.config.noise_repeats, self.config.denoiser.token_dim
        mask = random_mask(batch, length, generator, rows)
        own = [(generator, batch)] if rows is None else [(row, 1) for row in rows]
        steps = [torch.randint(TRAIN_STEPS, (repeats, size, length), generator=g) for g, size in own]
        noise = [torch.randn(repeats, size, length, dim, generator=g) for g, size in own]
        return MARDraws(
            mask=mask.to(self.device),
            steps=torch.cat(steps, 1).flatten().to(self.device),
            noise=torch.cat(noise, 1).flatten(0, 2).to(self.device),
        )

    def terms(self, z: Tensor, tokens: Tensor, draws: MARDraws) -> MARTerms:
        """The terms of the denoiser for condition vectors z [B, L, C] (MAR, eq. 1), computed in float32 or wider.

        tokens: the clean tokens [B, L, D]. draws: masks, steps and noise, of the latter B * L rows or a multiple.
        Raises: ValueError for another number of rows.
        """
        rows = tokens.shape[0] * tokens.shape[1]
        repeats = draws.steps.shape[0] // rows
        require(draws.steps.shape[0] == repeats * rows, "draws.steps", f"a multiple of {rows} rows", draws.steps)
        start = at_least_float32(tokens.detach()).flatten(0, 1).repeat(repeats, 1)
        tables = schedule()
        noisy = add_noise(start, draws.steps, draws.noise, tables)
        output = at_least_float32(self.denoiser(noisy, draws.steps, z.flatten(0, 1).repeat(repeats, 1)))
        noise, bound = diffusion_terms(output, start, draws.steps, draws.noise, tables)
        hidden = draws.mask.flatten().repeat(repeats)
        return MARTerms(masked_mean(noise, hidden), masked_mean(bound, hidden))


def buffers_last(x: Tensor, num_buffers: int) -> Tensor:
    """[buffers | tokens] to [tokens | buffers], the order in which a language model reads (Harmon, section 3.2)."""
    return torch.cat([x[:, num_buffers:], x[:, :num_buffers]], dim=1)


def buffers_first(x: Tensor, num_buffers: int) -> Tensor:
    """The inverse of `buffers_last`."""
    return buffers_last(x, x.shape[1] - num_buffers)


def drop_labels(labels: Tensor, share: float, generator: torch.Generator | None = None) -> Tensor:
    """Labels int64 [B], each replaced by -1 (no class) with probability `share`: what guidance needs in training."""
    dropped = torch.rand(labels.shape, generator=generator).to(labels.device) < share
    return labels.masked_fill(dropped, -1)


def decay_groups(model: torch.nn.Module, weight_decay: float, prefix: str = "") -> list[dict[str, Any]]:
    """Two groups for an optimizer: parameters that decay, and those that do not (see WITHOUT_DECAY).

    prefix: where MAR's own names begin inside `model`. Frozen parameters are left out.
    """
    free = tuple(prefix + name for name in WITHOUT_DECAY)
    groups: tuple[list[Tensor], list[Tensor]] = ([], [])
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            groups[parameter.ndim == 1 or name.endswith(".bias") or name.startswith(free)].append(parameter)
    return [
        {"params": groups[0], "weight_decay": weight_decay},
        {"params": groups[1], "weight_decay": 0.0},
    ]


def _same(name: str, *values: object) -> None:
    require(len(set(values)) == 1, name, "one value in all parts", " and ".join(map(str, values)))
