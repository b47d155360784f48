"""Our format on disk: config.json, model.safetensors, preprocessor_config.json and a model card.

config.json and the metadata of model.safetensors carry the same `save_id` (see `_summary`), so that files of two saves
are never taken for one tokenizer. Reading it back is `models.loading.load_directory`.
"""

import json
import os
import weakref
from collections.abc import Mapping
from hashlib import sha256
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from tokenizers_mm import __version__
from tokenizers_mm._files import atomic_directory, atomic_path, write_json, write_text
from tokenizers_mm._safetensors import file_start
from tokenizers_mm._summary import CONFIG, SAVE_ID, SUMMARY, WEIGHTS, save_id, tensors_id
from tokenizers_mm.config import to_mapping
from tokenizers_mm.kernels._ops import content
from tokenizers_mm.models.card import card

if TYPE_CHECKING:
    from tokenizers_mm.models.base import ImageTokenizer

FORMAT = 1
"""Version of config.json; raised when a file of an older library could no longer be read as it is."""

MODEL_TYPE = "tokenizers_mm"
"""Name of the form for transformers (`tokenizers_mm.llm.automodel`)."""

PREPROCESSOR, CARD = "preprocessor_config.json", "README.md"


def write(
    tokenizer: "ImageTokenizer[Any]",
    directory: str | os.PathLike[str],
    files: Mapping[str, str] | None = None,
    dtype: torch.dtype | None = None,
) -> None:
    """Write the four files, which replace those of an earlier save as a set.

    files: texts of further files by name; a README.md among them takes the place of the card. dtype: see
    `save_tensors`.
    """
    state = tokenizer.state_dict()
    shapes = {name: tuple(tensor.shape) for name, tensor in state.items()}
    config = _config(tokenizer) | {SUMMARY: summarize(tokenizer) | {"tensors": tensors_id(shapes)}}
    mark = {SAVE_ID: save_id(config)}
    with atomic_directory(directory) as folder:
        write_json(folder / CONFIG, config | mark)
        write_json(folder / PREPROCESSOR, _preprocessor(tokenizer))
        for name, text in ({CARD: card(tokenizer)} | dict(files or {})).items():
            write_text(folder / name, text)
        save_tensors(state, folder / WEIGHTS, mark, dtype)


def save_tensors(
    tensors: Mapping[str, Tensor],
    path: str | os.PathLike[str],
    metadata: Mapping[str, str] | None = None,
    dtype: torch.dtype | None = None,
) -> None:
    """Write a safetensors file, whole or not at all.

    dtype: kind of all floating-point numbers in the file; by default they keep theirs. Only one tensor at a time is
    copied, so that weights that are mapped from another file never stand in memory twice.
    """
    kinds = {n: dtype if dtype is not None and t.is_floating_point() else t.dtype for n, t in tensors.items()}
    names = sorted(tensors, key=lambda name: (-kinds[name].itemsize, name))  # wide numbers first: all are aligned
    entries = {name: (kinds[name], tensors[name].shape) for name in names}
    start = file_start(entries, {"format": "pt", **(metadata or {})})
    with atomic_path(path) as temporary, open(temporary, "wb") as file:
        file.write(start)
        for name in names:
            data = tensors[name].detach().to("cpu", kinds[name]).contiguous()
            file.write(data.reshape(-1).view(torch.uint8).numpy().data)


def _config(tokenizer: "ImageTokenizer[Any]") -> dict[str, Any]:
    return {
        "library": "tokenizers_mm",
        "library_version": __version__,
        "format": FORMAT,
        "model_type": MODEL_TYPE,
        "family": tokenizer.family,
        "config": to_mapping(tokenizer.config),
        "provenance": to_mapping(tokenizer.provenance),
    }


_fingerprints: "weakref.WeakKeyDictionary[ImageTokenizer[Any], tuple[Any, str]]" = weakref.WeakKeyDictionary()
"""By tokenizer: the configuration and the state of the weights, and the fingerprint of these."""


def fingerprint(tokenizer: "ImageTokenizer[Any]") -> str:
    """`FAMILY:DIGEST`: a digest of family, configuration and weights that names a tokenizer (see `_origin`).

    Weights count as bfloat16, so that copies in float64, float32 and bfloat16, which read the same ids, have one name,
    whatever the device. It is computed once for the same weights: their content decides where the library can read it,
    since `.data` and foreign pointers change no version.
    """
    tensors = sorted(tokenizer.state_dict().items())
    state = [(n, content(t) or (t.data_ptr(), t.dtype, 0 if t.is_inference() else t._version)) for n, t in tensors]
    known, name = _fingerprints.get(tokenizer, (None, ""))
    if known == (tokenizer.config, state):
        return name
    facts = {"family": tokenizer.family, "config": to_mapping(tokenizer.config)}
    found = sha256(json.dumps(facts, sort_keys=True).encode())
    for name, data in tensors:
        data = (data.bfloat16() if data.is_floating_point() else data).cpu().contiguous()
        found.update(f"{name} {data.dtype} {list(data.shape)}".encode())
        found.update(data.reshape(-1).view(torch.uint8).numpy())
    name = f"{tokenizer.family}:{found.hexdigest()[:32]}"
    _fingerprints[tokenizer] = (tokenizer.config, state), name
    return name


def summarize(tokenizer: "ImageTokenizer[Any]") -> dict[str, Any]:
    """Plain values that describe a tokenizer: what `tokenizers-mm info` prints."""
    size = tokenizer.image_size
    return {
        "parameters": sum(parameter.numel() for parameter in tokenizer.parameters()),
        "image_size": None if size is None else list(size),
        "size_multiple": tokenizer.size_multiple,
        "streams": to_mapping(tokenizer.streams(*size)) if size else [],
        "codebooks": {} if size else {name: each.codebook_size for name, each in tokenizer.quantizers().items()},
    }


def _preprocessor(tokenizer: "ImageTokenizer[Any]") -> dict[str, Any]:
    """Settings of a stock image processor of transformers, which prepares images as `prepare(..., fit="resize")` does.

    Equal for images of the size that is taken; after a change of size within 1 of 255 (another bicubic). It knows
    neither EXIF orientation nor colour profiles.
    """
    size = tokenizer.image_size
    return {
        "image_processor_type": "ViTImageProcessor",
        "do_resize": size is not None,
        "resample": 3,
        "do_convert_rgb": True,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": [0.5, 0.5, 0.5],
        "image_std": [0.5, 0.5, 0.5],
        "size": None if size is None else {"height": size[0], "width": size[1]},
        "size_multiple": tokenizer.size_multiple,
    }
