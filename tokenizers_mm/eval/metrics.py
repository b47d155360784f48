"""METRICS, the one table of metrics."""

from tokenizers_mm.eval import fidelity, networks, pixels, semantics
from tokenizers_mm.eval.base import Metric

_ALL: tuple[type[Metric], ...] = (
    *(pixels.Bits, pixels.BitsPerPixel, pixels.PSNR, pixels.SSIM, pixels.UniformSSIM, pixels.MultiScaleSSIM),
    *(networks.PerceptualDistance, networks.StructureAndTexture),
    *(networks.RFID, networks.InceptionScore, networks.KernelInceptionDistance),
    *(networks.FeatureDistance, networks.ClassAgreement),
    *(fidelity.TextError, fidelity.FaceRecall, fidelity.EyeDistance),
    *(semantics.NearestNeighbours, semantics.LinearProbe, semantics.ZeroShot, semantics.Retrieval),
    pixels.Codebook,
)

METRICS: dict[str, type[Metric]] = {metric.name: metric for metric in _ALL}
"""Metrics by name, in the order of the report."""
