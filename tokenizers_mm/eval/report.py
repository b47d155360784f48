"""A folder of images in, one JSON report out, with the protocol inside."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tokenizers_mm._check import fail, require
from tokenizers_mm._images import Fit, image_to_tensor, read_image
from tokenizers_mm.eval.codebook import CodebookCounts
from tokenizers_mm.eval.fid import FrechetDistance
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
    """Metrics over image files, one after the other; a file that cannot be used is named, counted and left out.

    inception: a weights file for rFID, which is left out (with the reason) where there is none. All values are such as
    JSON has: `psnr` is None where every reconstruction equals its image.
    """
    skipped: list[str] = []
    rows: list[tuple[float, float]] = []
    counts = CodebookCounts()
    distance, missing = _distance(inception)
    for path in paths:
        try:
            image = tokenizer.fit_picture(read_image(path), fit)
            tokenizer.check_size(image.height, image.width, f"image {path}")
            require(min(image.size) >= 11, f"image {path}", "at least 11 x 11 pixels", image.size[::-1])
        except ValueError as error:
            skipped.append(str(error))
            continue
        x = image_to_tensor(image)[None]
        reconstruction, codes = reconstruct(tokenizer, x)
        require(bool(reconstruction.isfinite().all()), f"reconstruction of {path}", "finite values", "NaN")
        for code in codes:
            counts.add(code)
        if distance is not None:
            distance.add(x, reconstruction)
        rows.append((float(psnr(x, reconstruction)), float(ssim(x, reconstruction))))
    if not rows:
        fail("images", "at least one that can be used", f"none ({len(skipped)} refused; {skipped[:1]})")
    finite = [value for value, _ in rows if math.isfinite(value)]
    report: dict[str, Any] = {
        "protocol": {
            "fit": fit,
            "size": list(tokenizer.image_size or ()) or "own",
            "psnr": "mean over images that differ from their reconstruction (it is infinite for the others), range 1",
            "ssim": "Gaussian window, sigma 1.5, range 1, mean over images",
        },
        "images": len(rows),
        "lossless": len(rows) - len(finite),
        "skipped": skipped,
        "psnr": math.fsum(finite) / len(finite) if finite else None,
        "ssim": math.fsum(value for _, value in rows) / len(rows),
    }
    if found := counts.report():
        report["codebook"] = found
    if distance is not None and len(rows) < 2:
        distance, missing = None, "rfid: expected at least two images, got one"
    report["rfid"] = None if distance is None else distance.value()
    return report if distance is not None else report | {"rfid_missing": missing}


def _distance(inception: str | None) -> tuple[FrechetDistance | None, str]:
    """What measures rFID, or the reason why nothing does."""
    try:
        return FrechetDistance(inception), ""
    except (ValueError, ImportError) as error:
        return None, str(error)
