"""Metrics of pixels, bits and ids: none needs a network."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from tokenizers_mm.eval import image
from tokenizers_mm.eval.base import Batch, Metric, PerImage, Setup
from tokenizers_mm.eval.codebook import CodebookCounts


def _pair(batch: Batch) -> image.Pair:
    """Originals and reconstructions, checked for the first of the metrics that ask."""
    if "pair" not in batch.own:
        batch.own["pair"] = image.Pair(batch.originals, batch.reconstructions)
    return batch.own["pair"]


class PSNR(PerImage):
    """Peak signal-to-noise ratio, mean over images that differ from their reconstruction."""

    name, label, unit, better = "psnr", "PSNR", "dB", "higher"
    infinite, small = True, True

    def scores(self, batch: Batch) -> Tensor:
        return _pair(batch).psnr()


class SSIM(PerImage):
    """Structural similarity by the window and the range of the protocol."""

    name, label, better, least, small = "ssim", "SSIM", "higher", 11, True

    def scores(self, batch: Batch) -> Tensor:
        protocol = self.setup.protocol
        return _pair(batch).ssim(protocol.ssim, protocol.ssim_range)


class UniformSSIM(PerImage):
    """Structural similarity with scikit-image's default: a uniform 7 x 7 window, range 1."""

    name, label, better, least, small = "ssim_uniform", "SSIM (uniform 7 x 7)", "higher", 7, True

    def scores(self, batch: Batch) -> Tensor:
        return _pair(batch).ssim("uniform7")


class MultiScaleSSIM(PerImage):
    """Multi-scale structural similarity."""

    name, label, better, least, small = "ms_ssim", "MS-SSIM", "higher", image.MS_SSIM_SIDE, True

    def scores(self, batch: Batch) -> Tensor:
        return _pair(batch).ms_ssim()


class Bits(PerImage):
    """Bits of an image: ids times log2 of the codes, 16 bits for a value of a continuous latent, a codec's payload."""

    name, label, unit, better = "bits", "bits per image", "bit", "lower"

    def scores(self, batch: Batch) -> Tensor:
        return torch.tensor(batch.bits, dtype=torch.float64)


class BitsPerPixel(PerImage):
    """The same by pixel of the image."""

    name, label, unit, better = "bits_per_pixel", "bits per pixel", "bit", "lower"

    def scores(self, batch: Batch) -> Tensor:
        height, width = batch.originals.shape[-2:]
        return torch.tensor(batch.bits, dtype=torch.float64) / (height * width)


class Codebook(Metric):
    """Use of every codebook, by stream and scale: usage, perplexity, dead codes, entropies, ideal code length."""

    name, label = "codebook", "codebook"

    def __init__(self, setup: Setup) -> None:
        super().__init__(setup)
        self.counts = CodebookCounts()

    def update(self, batch: Batch) -> None:
        if batch.codes is not None:
            self.counts.add(batch.codes)

    def result(self) -> dict[str, Any] | None:
        return self.counts.report() or None

    def state(self) -> dict[str, Tensor]:
        return self.counts.state()

    def restore(self, state: Mapping[str, Tensor]) -> None:
        self.counts = CodebookCounts.restored(state)
