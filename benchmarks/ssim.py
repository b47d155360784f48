"""SSIM against scikit-image: the kernel, PSNR and both windows of SSIM of images, and the whole command `eval`.

    python -m benchmarks.ssim [--side 256] [--images 64] [--rounds 5] [--threads 1] [--record]

Milliseconds per image, CPU time of all threads. Each of the images is a photograph, and a JPEG of it with quality 75.
The command also reads files, makes the JPEGs, and writes report and page; the loop reads the same files, makes the same
JPEGs, and takes the same three numbers of each. `--wall` takes wall time, which several cores shorten for both.
"""

import contextlib
import io
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from skimage.metrics import peak_signal_noise_ratio, structural_similarity

from benchmarks import harness
from tokenizers_mm import kernels
from tokenizers_mm._images import image_to_tensor
from tokenizers_mm.cli import main as command
from tokenizers_mm.data.photographs import fixed_crops
from tokenizers_mm.eval import image as metric
from tokenizers_mm.functional.similarity import gaussian_line, ssim_parts, uniform_line

GAUSSIAN = {"gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": False}
CROPS = 64
"""Different images at most; more files repeat them."""

METRICS = "bits,bits_per_pixel,psnr,ssim,ssim_uniform"


def by_jpeg(image: Image.Image) -> Image.Image:
    """The image after a way through JPEG, as `jpeg@q75` of `eval` makes it."""
    stream = io.BytesIO()
    image.save(stream, format="jpeg", quality=75)
    return Image.open(stream).convert("RGB")


def by_scikit_image(x: np.ndarray, y: np.ndarray) -> tuple[float, float, float]:
    """PSNR, SSIM with a Gaussian window and with a uniform one, of images [H, W, 3] in [0, 1]."""
    options: dict[str, Any] = {"channel_axis": 2, "data_range": 1}
    gaussian = structural_similarity(x, y, **options, **GAUSSIAN)
    psnr = peak_signal_noise_ratio(x, y, data_range=1)
    return float(psnr), float(gaussian), float(structural_similarity(x, y, **options))  # type: ignore[arg-type]


def by_ours(a: torch.Tensor, b: torch.Tensor) -> tuple[float, float, float]:
    """The same, of images [1, 3, H, W] in [-1, 1]."""
    pair = metric.Pair(a, b)
    return float(pair.psnr()), float(pair.ssim()), float(pair.ssim("uniform7"))


def loop_over(folder: Path) -> list[tuple[float, float, float]]:
    """The three numbers of each image of a folder, as a script with scikit-image computes them."""
    found = []
    for path in sorted(folder.iterdir()):
        with Image.open(path) as file:
            image = file.convert("RGB")
        found.append(by_scikit_image(np.asarray(image) / 255, np.asarray(by_jpeg(image)) / 255))
    return found


def run_command(folder: Path, out: Path) -> None:
    """`tokenizers-mm eval jpeg@q75` over a folder."""
    with contextlib.redirect_stdout(io.StringIO()):
        assert command(["eval", "jpeg@q75", "--images", str(folder), "--metrics", METRICS, "--out", str(out)]) == 0


def main(arguments: Sequence[str] | None = None) -> None:
    parser = harness.parser(__doc__)
    parser.add_argument("--side", type=int, default=256)
    parser.add_argument(
        "--images", type=int, default=64, help="images of the command; the metrics alone take 8 of them"
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1, help="threads of the kernel alone; `eval` chooses by itself")
    parser.add_argument("--wall", action="store_true", help="wall time in place of CPU time")
    options = parser.parse_args(arguments)
    about, clock = harness.machine(), "wall" if options.wall else "cpu"
    torch.set_num_threads(options.threads)
    crops = fixed_crops("heldout", min(options.images, CROPS), options.side)
    some = [(crop, by_jpeg(crop)) for crop in crops[:8]]
    arrays = [tuple(np.asarray(image) / 255 for image in pair) for pair in some]
    tensors = [tuple(image_to_tensor(image)[None] for image in pair) for pair in some]
    differences = np.abs(np.array([by_ours(*t) for t in tensors]) - np.array([by_scikit_image(*a) for a in arrays]))

    def kernel(line: torch.Tensor, mode: str) -> Callable[[], Any]:
        def measure() -> None:
            with kernels.use_kernels(mode):
                for a, b in tensors:
                    ssim_parts(a, b, line, 2.0, offset=1.0)

        return measure

    native = "native" if kernels.describe()["path"] == "native" else "reference"
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place) / "images"
        folder.mkdir()
        for index in range(options.images):
            crops[index % len(crops)].save(folder / f"{index:05d}.png")
        cases: dict[str, tuple[int, dict[str, Callable[[], Any]]]] = {
            "kernel, Gaussian": (
                8,
                {"ours": kernel(gaussian_line(), native), "torch": kernel(gaussian_line(), "reference")},
            ),
            "kernel, uniform": (
                8,
                {"ours": kernel(uniform_line(), native), "torch": kernel(uniform_line(), "reference")},
            ),
            "PSNR and both SSIM": (
                8,
                {
                    "ours": lambda: [by_ours(*t) for t in tensors],
                    "scikit-image": lambda: [by_scikit_image(*a) for a in arrays],
                },
            ),
            "whole command": (
                options.images,
                {"ours": lambda: run_command(folder, Path(place) / "out"), "scikit-image": lambda: loop_over(folder)},
            ),
        }
        for name, (count, methods) in cases.items():
            count = min(count, options.images)
            times = {k: t / count for k, t in harness.interleave(methods, options.rounds, clock=clock).items()}
            print(f"\n{name}, {options.side} x {options.side}, per image\n{harness.table(harness.against_ours(times))}")
            row = {"case": name, "side": options.side, "images": count, "threads": options.threads, "clock": clock}
            if options.record:
                harness.record("ssim", {**row, "milliseconds": times, "difference": float(differences.max())}, about)
    print(f"\nlargest difference from scikit-image: {differences.max():.1e}")


if __name__ == "__main__":
    main()
