"""The explorer: one static page in which ids of images are looked at, swapped and decoded, by the exported decoder.

The folder holds index.html with images and ids, decoder.js with the ONNX graph and runtime.js with onnxruntime-web.
Both scripts carry their bytes compressed, so that the page works from a file as from a server, and asks for nothing
else.
"""

import base64
import gzip
import importlib.resources
import io
import json
import os
from collections.abc import Callable, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from PIL import Image
from torch import Tensor, nn

from tokenizers_mm._check import fail, naming, require
from tokenizers_mm._files import atomic_directory, regular_file, temporary_directory
from tokenizers_mm._images import Fit, fit_image, image_to_tensor, read_image
from tokenizers_mm.export.graph import write_onnx
from tokenizers_mm.models.base import ImageTokenizer
from tokenizers_mm.types import ImageCodes, Stream

MOST_IMAGES = 256
"""Images of one page at most: they are in it as data."""

BUNDLE = "ort.webgpu.bundle.min.mjs"
BINARY = "ort-wasm-simd-threaded.asyncify.wasm"
"""Files of the npm package onnxruntime-web, in its folder dist: code for WebGPU and for WebAssembly in one."""


@runtime_checkable
class DecodesVectors(Protocol):
    """A tokenizer whose `decode` is `decode_pixels` of `vectors`."""

    def decode_pixels(self, vectors: Tensor) -> Tensor: ...


class CoarseToFine(nn.Module):
    """ids int64 [1, L], weights float32 [P] -> image [1, 3, H, W], not clamped.

    P is the number of `lengths`. The weights mix the vectors of the first ids up to each of these: a one and zeros
    decode up to a scale.
    """

    def __init__(self, tokenizer: ImageTokenizer[Any], height: int, width: int) -> None:
        super().__init__()
        require(isinstance(tokenizer, DecodesVectors), "tokenizer", "one that decodes vectors", tokenizer.family)
        self.tokenizer, self.height, self.width = tokenizer, height, width
        self.lengths = lengths(tokenizer.streams(height, width))

    def forward(self, ids: Tensor, weights: Tensor) -> Tensor:
        streams = self.tokenizer.streams(self.height, self.width)
        parts = [
            weight * self.tokenizer.vectors(ImageCodes(ids[:, :length], self.height, self.width, streams))
            for weight, length in zip(weights.unbind(), self.lengths, strict=True)
        ]
        return self.tokenizer.decode_pixels(torch.stack(parts).sum(0))  # type: ignore[operator]


def lengths(streams: Sequence[Stream]) -> list[int]:
    """Numbers of ids that can be decoded: after each scale of a single stream, else all of them."""
    ends = list(accumulate(rows * columns for stream in streams for rows, columns in stream.grids))
    return ends if len(streams) == 1 else ends[-1:]


@torch.no_grad()
def explore(
    tokenizer: ImageTokenizer[Any],
    name: str,
    images: Sequence[str | os.PathLike[str]],
    directory: str | os.PathLike[str],
    fit: Fit = "crop",
    size: tuple[int, int] | None = None,
    runtime: str | os.PathLike[str] | None = None,
    refused: Callable[[ValueError], None] | None = None,
) -> Path:
    """Write the page of a tokenizer and some images into a folder; open its index.html.

    name: how the page calls the tokenizer. fit: for images of another size: "refuse", "crop", "pad" or "resize".
    size: (height, width), needed where the tokenizer takes any. runtime: the folder of the npm package onnxruntime-web;
    by default node_modules/onnxruntime-web here or in a folder above. refused: called with the error of an image that
    cannot be read or is of a wrong size; by default the error is raised.

    Raises:
        ValueError: no runtime, a tokenizer without ids, no readable image, or more than `MOST_IMAGES`.
    """
    size = size or tokenizer.image_size
    if size is None:
        fail("size", "the height and width of the images", "nothing")
    tokenizer.check_size(*size)
    require(len(tokenizer.streams(*size)) > 0, "tokenizer", "one with ids", "a continuous one")
    require(0 < len(images) <= MOST_IMAGES, "images", f"1 to {MOST_IMAGES}", len(images))
    scripts = runtime_files(runtime)
    tokenizer = tokenizer.eval()
    facts = page_data(tokenizer, name, images, fit, size, refused)
    with temporary_directory() as folder:
        decoder = decoder_graph(tokenizer, size, folder / "decoder.onnx")
    with atomic_directory(directory) as folder:
        (folder / "index.html").write_text(page(facts), encoding="utf-8")
        (folder / "decoder.js").write_text(script({"decoder": decoder}), encoding="ascii")
        (folder / "runtime.js").write_text(script(scripts), encoding="ascii")
    return Path(directory) / "index.html"


def page_data(
    tokenizer: ImageTokenizer[Any],
    name: str,
    images: Sequence[str | os.PathLike[str]],
    fit: Fit,
    size: tuple[int, int],
    refused: Callable[[ValueError], None] | None = None,
) -> dict[str, Any]:
    """Data of the page: the streams and, of every image, its name, its pixels as WebP and its ids."""
    height, width = size
    streams = tokenizer.streams(height, width)
    listed = []
    for path in images:
        try:
            image = read_image(path)
            if fit != "refuse":
                with naming(f"image {path}"):
                    image = fit_image(image, height, width, fit)
            found = f"{image.height} x {image.width}"
            require((image.height, image.width) == size, f"image {path}", f"{height} x {width} pixels", found)
        except ValueError as error:
            if refused is None:
                raise
            refused(error)
            continue
        x = image_to_tensor(image)[None].to(tokenizer.device, tokenizer.dtype)
        ids = tokenizer.encode_tensor(x).ids[0].tolist()
        listed.append({"name": Path(path).stem, "source": _as_url(image), "ids": ids})
    require(len(listed) > 0, "images", "at least one readable image", f"none of {len(images)}")
    return {
        "tokenizer": name,
        "family": tokenizer.family,
        "height": height,
        "width": width,
        "streams": [
            {"name": stream.name, "size": stream.codebook_size, "grids": [list(grid) for grid in stream.grids]}
            for stream in streams
        ],
        "lengths": lengths(streams),
        "images": listed,
    }


def decoder_graph(tokenizer: ImageTokenizer[Any], size: tuple[int, int], path: Path) -> bytes:
    """The ONNX graph of `CoarseToFine`, written at `path`, compared with the model, and read back."""
    module = CoarseToFine(tokenizer, *size).eval()
    total = module.lengths[-1]
    streams = tokenizer.streams(*size)
    low = min(stream.codebook_size for stream in streams)
    ids = (torch.arange(total, device=tokenizer.device) * 7919 % low)[None]
    weights = torch.zeros(len(module.lengths), device=tokenizer.device)
    weights[-1] = 1
    expected = tokenizer.decode(ImageCodes(ids, *size, streams))
    (image,) = write_onnx(module, (ids, weights), path, one_file=True)
    difference = float((image - expected).abs().max())
    require(difference <= 1e-3, "the decoder graph", "the image of the model", f"a difference of {difference:.2g}")
    return path.read_bytes()


def runtime_files(folder: str | os.PathLike[str] | None) -> dict[str, bytes]:
    """The code of onnxruntime-web from the folder of its npm package: "module" and "binary"."""
    if folder is None:
        here = Path.cwd()
        places = [parent / "node_modules" / "onnxruntime-web" for parent in (here, *here.parents)]
        found = next((place for place in places if (place / "dist" / BUNDLE).is_file()), None)
        if found is None:
            expected = "the folder of the npm package onnxruntime-web (npm install onnxruntime-web)"
            fail("runtime", expected, "no node_modules/onnxruntime-web here or in a folder above")
        folder = found
    dist = Path(folder) / "dist"
    wanted = {"module": BUNDLE, "binary": BINARY}
    return {
        key: regular_file(dist / file, "a file of onnxruntime-web 1.24 or later").read_bytes()
        for key, file in wanted.items()
    }


def script(files: dict[str, bytes]) -> str:
    """A script that hands files to the page, each compressed (gzip) and in base64."""
    coded = {key: base64.b64encode(gzip.compress(data, 6, mtime=0)).decode() for key, data in files.items()}
    return "".join(f'(globalThis.explorerFiles ??= {{}}).{key} = "{text}";\n' for key, text in coded.items())


def page(facts: dict[str, Any]) -> str:
    """The page, with its style, its code and the data in it."""
    folder = importlib.resources.files("tokenizers_mm.export") / "page"
    text = (folder / "explorer.html").read_text(encoding="utf-8")
    data = json.dumps(facts, ensure_ascii=True, allow_nan=False, separators=(",", ":")).replace("<", "\\u003c")
    parts = {"STYLE": "explorer.css", "CODE": "explorer.js"}
    for mark, file in parts.items():
        text = text.replace(f"/*{mark}*/", (folder / file).read_text(encoding="utf-8"))
    return text.replace("/*DATA*/", data)


def _as_url(image: Image.Image) -> str:
    stream = io.BytesIO()
    image.save(stream, format="WEBP", quality=88, method=6)
    return "data:image/webp;base64," + base64.b64encode(stream.getvalue()).decode()
