"""Our format on disk: config.json, model.safetensors, preprocessor_config.json and a model card.

config.json and the metadata of model.safetensors carry the same `save_id` (see `_summary`), so that files of two saves
are never taken for one tokenizer. Reading it back is `models.loading.load_directory`.
"""

import json
import os
import tempfile
from collections.abc import Mapping
from hashlib import sha256
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from tokenizers_mm._files import atomic_directory, atomic_path, write_json, write_text
from tokenizers_mm._summary import CONFIG, SAVE_ID, SUMMARY, WEIGHTS, save_id, tensors_id
from tokenizers_mm.config import to_mapping

if TYPE_CHECKING:
    from tokenizers_mm.models.base import ImageTokenizer

FORMAT = 1
"""Of config.json; raised when a file of an older library could no longer be read as it is."""

PREPROCESSOR, CARD = "preprocessor_config.json", "README.md"


def write(tokenizer: "ImageTokenizer[Any]", directory: str | os.PathLike[str]) -> None:
    """Write the four files, which replace those of an earlier save as a set."""
    state = tokenizer.state_dict()
    shapes = {name: tuple(tensor.shape) for name, tensor in state.items()}
    config = _config(tokenizer) | {SUMMARY: summarize(tokenizer) | {"tensors": tensors_id(shapes)}}
    mark = {SAVE_ID: save_id(config)}
    with atomic_directory(directory) as folder:
        write_json(folder / CONFIG, config | mark)
        write_json(folder / PREPROCESSOR, _preprocessor(tokenizer))
        write_text(folder / CARD, _card(tokenizer))
        save_tensors(state, folder / WEIGHTS, mark)


def save_tensors(
    tensors: Mapping[str, Tensor], path: str | os.PathLike[str], metadata: Mapping[str, str] | None = None
) -> None:
    """Write a safetensors file, whole or not at all."""
    with atomic_path(path) as temporary:
        ready = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
        save_file(ready, temporary, metadata={"format": "pt", **(metadata or {})})


def push(tokenizer: "ImageTokenizer[Any]", repo_id: str, private: bool) -> str:
    """Upload the four files as one commit."""
    from huggingface_hub import HfApi  # network code: loaded when asked for

    with tempfile.TemporaryDirectory() as folder:
        directory = Path(folder) / "tokenizer"
        write(tokenizer, directory)
        api = HfApi()
        api.create_repo(repo_id, private=private, exist_ok=True)
        return str(api.upload_folder(repo_id=repo_id, folder_path=directory, commit_message="Upload tokenizer"))


def _config(tokenizer: "ImageTokenizer[Any]") -> dict[str, Any]:
    return {
        "library": "tokenizers_mm",
        "library_version": metadata.version("tokenizers_mm"),
        "format": FORMAT,
        "family": tokenizer.family,
        "config": to_mapping(tokenizer.config),
        "provenance": to_mapping(tokenizer.provenance),
    }


def fingerprint(tokenizer: "ImageTokenizer[Any]") -> str:
    """A digest of family, configuration and weights, the same whatever the device: equal ones give equal ids."""
    facts = {"family": tokenizer.family, "config": to_mapping(tokenizer.config)}
    found = sha256(json.dumps(facts, sort_keys=True).encode())
    for name, tensor in sorted(tokenizer.state_dict().items()):
        data = tensor.detach().cpu().contiguous()
        found.update(f"{name} {data.dtype} {list(data.shape)}".encode())
        found.update(data.reshape(-1).view(torch.uint8).numpy())
    return found.hexdigest()


def summarize(tokenizer: "ImageTokenizer[Any]") -> dict[str, Any]:
    """Plain values that describe a tokenizer: what `tokenizers-mm info` prints."""
    size = tokenizer.image_size
    return {
        "parameters": sum(parameter.numel() for parameter in tokenizer.parameters()),
        "image_size": None if size is None else list(size),
        "size_multiple": tokenizer.size_multiple,
        "streams": to_mapping(tokenizer.streams(*size)) if size else [],
    }


def _preprocessor(tokenizer: "ImageTokenizer[Any]") -> dict[str, Any]:
    size = tokenizer.image_size
    return {
        "image_processor_type": "tokenizers_mm",
        "do_convert_rgb": True,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": [0.5, 0.5, 0.5],
        "image_std": [0.5, 0.5, 0.5],
        "size": None if size is None else {"height": size[0], "width": size[1]},
        "size_multiple": tokenizer.size_multiple,
    }


def _card(tokenizer: "ImageTokenizer[Any]") -> str:
    origin = tokenizer.provenance
    size = tokenizer.image_size
    lines = ["---", "library_name: tokenizers_mm", "tags: [image-tokenizer]"]
    lines += [f"license: {origin.license.lower()}"] if origin.license else []
    lines += ["---", "", f"# A {tokenizer.family} image tokenizer", ""]
    lines.append(
        f"Images: {f'{size[0]} x {size[1]}' if size else f'any multiple of {tokenizer.size_multiple}'} pixels, RGB."
    )
    for stream in tokenizer.streams(*size) if size else ():
        grids = ", ".join(f"{rows}x{columns}" for rows, columns in stream.grids)
        lines.append(f"Stream `{stream.name}`: {stream.num_ids} ids of {stream.codebook_size} codes (grids {grids}).")
    facts = {
        "Source": origin.source,
        "Licence": origin.license,
        "sha256 of the source": origin.sha256,
        "Notice": origin.notice,
    }
    lines += [f"{name}: {value}" for name, value in facts.items() if value]
    lines += ["", "```python", "import tokenizers_mm as tmm", "", "tok = tmm.load('this directory')"]
    lines += ["codes = tok.encode('picture.png', fit='crop')", "image = tok.to_pil(tok.decode(codes))[0]", "```", ""]
    return "\n".join(lines)
