"""Held-out images and what is measured on them."""

from dataclasses import dataclass
from typing import Annotated, Any

import torch
from torch import Tensor

from tokenizers_mm._images import fit_image, image_to_tensor, read_image
from tokenizers_mm._ranks import share_from_first
from tokenizers_mm.config import Range
from tokenizers_mm.data.files import list_images
from tokenizers_mm.data.scenes import make_scene
from tokenizers_mm.eval.codebook import codebook_health
from tokenizers_mm.eval.fid import rfid
from tokenizers_mm.eval.image import psnr, ssim
from tokenizers_mm.eval.report import reconstruct
from tokenizers_mm.losses.perceptual import LPIPS


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


def measure(tokenizer: Any, images: Tensor, inception: str = "", lpips: LPIPS | None = None) -> dict[str, float]:
    """Mean PSNR (dB) and SSIM of reconstructions from codes alone, the smallest usage of a codebook, mean LPIPS where
    its network is given, and rFID where `inception` names torch-fidelity's weights file.

    Values of rank 0, so that all ranks decide alike. Pixels that are not finite count as grey.
    """
    training = tokenizer.training
    tokenizer.eval()
    decoded, codes = reconstruct(tokenizer, images)
    tokenizer.train(training)
    decoded = torch.nan_to_num(decoded, nan=0.0)
    found = {"psnr": float(psnr(images, decoded).clamp(max=100.0).mean()), "ssim": float(ssim(images, decoded).mean())}
    if codes:
        found["usage"] = min(stream["usage"] for stream in codebook_health(codes).values())
    if lpips is not None:
        parts = zip(images.split(8), decoded.split(8), strict=True)
        with torch.no_grad():
            found["lpips"] = float(torch.cat([lpips(a, b.clamp(-1, 1)) for a, b in parts]).mean())
    if inception:
        found["rfid"] = rfid(list(images), list(decoded), inception)
    values = torch.tensor(list(found.values()), dtype=torch.float64, device=tokenizer.device)
    return dict(zip(found, share_from_first(values).tolist(), strict=True))
