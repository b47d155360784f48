"""A folder of images in, one JSON report out, with the protocol inside."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tokenizers_mm._images import Fit, fit_image, image_to_tensor, read_image
from tokenizers_mm.eval.codebook import codebook_health
from tokenizers_mm.eval.fid import rfid
from tokenizers_mm.eval.image import psnr, ssim
from tokenizers_mm.models.base import ImageTokenizer
from tokenizers_mm.types import ImageCodes


def reconstruct(
    tokenizer: ImageTokenizer[Any], images: Tensor, batch_size: int = 16
) -> tuple[Tensor, list[ImageCodes]]:
    """Reconstructions [B, 3, H, W], clamped to [-1, 1], from the ids alone, and the codes (none if continuous)."""
    decoded, codes = [], []
    with torch.no_grad():
        for part in images.split(batch_size):
            code = tokenizer.encode(part)
            decoded.append(tokenizer.decode(code).float().clamp(-1, 1).cpu())
            codes += [code.to("cpu")] if isinstance(code, ImageCodes) else []
    return torch.cat(decoded), codes


def evaluate(
    tokenizer: ImageTokenizer[Any], paths: Sequence[Path], fit: Fit = "crop", inception: str | None = None
) -> dict[str, Any]:
    """Metrics over image files; a file that cannot be read is named, counted and left out.

    inception: a weights file for rFID, which is left out (with the reason) where there is none.
    """
    originals, skipped = [], []
    for path in paths:
        try:
            image = read_image(path)
        except ValueError as error:
            skipped.append(str(error))
            continue
        if tokenizer.image_size is not None:
            image = fit_image(image, *tokenizer.image_size, fit)
        originals.append(image_to_tensor(image))
    if not originals:
        raise ValueError(f"images: expected at least one readable image, got none ({len(skipped)} unreadable)")
    rows, codes, decoded = [], [], []
    for image in originals:
        reconstruction, code = reconstruct(tokenizer, image[None])
        codes += code
        decoded.append(reconstruction[0])
        rows.append((float(psnr(image[None], reconstruction)), float(ssim(image[None], reconstruction))))
    values = torch.tensor(rows, dtype=torch.float64)
    report: dict[str, Any] = {
        "protocol": {
            "fit": fit,
            "size": list(tokenizer.image_size or ()) or "own",
            "psnr": "mean over images, range 1",
            "ssim": "Gaussian window, sigma 1.5, range 1, mean over images",
        },
        "images": len(originals),
        "skipped": skipped,
        "psnr": float(values[:, 0].mean()),
        "ssim": float(values[:, 1].mean()),
    }
    if codes:
        report["codebook"] = codebook_health(codes)
    try:
        report["rfid"] = rfid(originals, decoded, inception)
    except (ValueError, ImportError) as error:
        report["rfid"] = None
        report["rfid_missing"] = str(error)
    return report
