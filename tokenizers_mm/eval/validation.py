"""Held-out images and what is measured on them."""

from dataclasses import dataclass
from typing import Annotated, Any

import torch
from torch import Tensor

from tokenizers_mm._images import finite_extremes, fit_image, image_to_tensor, read_image
from tokenizers_mm._ranks import share_from_first
from tokenizers_mm.config import Range
from tokenizers_mm.data.files import list_images
from tokenizers_mm.data.scenes import make_scene
from tokenizers_mm.eval.base import Batch, Setup
from tokenizers_mm.eval.codebook import codebook_health
from tokenizers_mm.eval.image import psnr, ssim
from tokenizers_mm.eval.networks import RFID
from tokenizers_mm.eval.protocols import PROTOCOLS
from tokenizers_mm.losses.perceptual import LPIPS
from tokenizers_mm.models.base import ImageTokenizer
from tokenizers_mm.types import ImageCodes


@dataclass(frozen=True)
class ValidationConfig:
    """folder: of images that no training sees, by default held-out rendered scenes. images: their number.

    lpips_weights: file of VGG16 weights (see `losses.perceptual`), with which LPIPS is measured too.
    """

    folder: str = ""
    images: Annotated[int, Range(1)] = 64
    lpips_weights: str = ""


def held_out(folder: str, count: int, size: tuple[int, int]) -> Tensor:
    """Images [N, 3, H, W] in [-1, 1]: the first `count` of a folder by name, or held-out scenes where it is ""."""
    height, width = size
    if folder:
        files = list_images(folder)[:count]
        return torch.stack([image_to_tensor(fit_image(read_image(file), height, width, "crop")) for file in files])
    scenes = [make_scene(index, "heldout").render(max(size)) for index in range(count)]
    return torch.stack([image_to_tensor(scene.resize((width, height))) for scene in scenes])


def reconstruct(
    tokenizer: ImageTokenizer[Any], images: Tensor, batch_size: int = 16
) -> tuple[Tensor, list[ImageCodes]]:
    """Reconstructions [B, 3, H, W], clamped to [-1, 1], from the codes alone, and the codes (none if continuous)."""
    decoded, codes = [], []
    with torch.no_grad():
        for part in images.split(batch_size):
            code = tokenizer.encode(part)
            decoded.append(tokenizer.decode(code).float().clamp(-1, 1).cpu())
            codes += [code.to("cpu")] if isinstance(code, ImageCodes) else []
    return torch.cat(decoded), codes


def measure(tokenizer: Any, images: Tensor, inception: str = "", lpips: LPIPS | None = None) -> dict[str, float]:
    """Mean PSNR (dB) and SSIM of reconstructions from codes alone, the smallest usage of a codebook, mean LPIPS where
    its network is given, and rFID where `inception` names torch-fidelity's weights file.

    Values of rank 0, so that all ranks decide alike.

    Raises:
        ValueError: a reconstruction has pixels that are not finite.
    """
    training = tokenizer.training
    tokenizer.eval()
    decoded, codes = reconstruct(tokenizer, images)
    tokenizer.train(training)
    finite_extremes(decoded, "reconstructions of held-out images")
    found = {"psnr": float(psnr(images, decoded).clamp(max=100.0).mean()), "ssim": float(ssim(images, decoded).mean())}
    if codes:
        found["usage"] = min(stream["usage"] for stream in codebook_health(codes).values())
    if lpips is not None:
        parts = zip(images.split(8), decoded.split(8), strict=True)
        with torch.no_grad():
            found["lpips"] = float(torch.cat([lpips(a, b.clamp(-1, 1)) for a, b in parts]).mean())
    if inception:
        distance = RFID(Setup(PROTOCOLS["default"], {"inception": inception}))
        for originals, made in zip(images.split(8), decoded.split(8), strict=True):
            distance.update(Batch(originals, made))
        found["rfid"] = distance.result()["mean"]
    values = torch.tensor(list(found.values()), dtype=torch.float64, device=tokenizer.device)
    return dict(zip(found, share_from_first(values).tolist(), strict=True))
