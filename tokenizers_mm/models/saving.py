"""Our format on disk: config.json, model.safetensors, preprocessor_config.json and a model card.

config.json and the metadata of model.safetensors carry the same `save_id`, a hash of all that config.json says, so that
files of two saves are never taken for one tokenizer. Reading it back is `models.loading.load_directory`.
"""

import hashlib
import json
import os
import tempfile
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors.torch import save_file
from torch import Tensor

from tokenizers_mm._files import atomic_directory, atomic_path, write_json, write_text
from tokenizers_mm.config import to_mapping

if TYPE_CHECKING:
    from tokenizers_mm.models.base import ImageTokenizer

FORMAT = 1
"""Of config.json; raised when a file of an older library could no longer be read as it is."""

SAVE_ID = "save_id"
"""The key of the hash that binds the weights to their configuration."""

CONFIG, WEIGHTS, PREPROCESSOR, CARD = "config.json", "model.safetensors", "preprocessor_config.json", "README.md"


def write(tokenizer: "ImageTokenizer[Any]", directory: str | os.PathLike[str]) -> None:
    """Write the four files, which replace those of an earlier save as a set."""
    config = _config(tokenizer)
    save_id = hashlib.sha256(json.dumps(config, sort_keys=True).encode()).hexdigest()[:32]
    with atomic_directory(directory) as folder:
        write_json(folder / CONFIG, config | {SAVE_ID: save_id})
        write_json(folder / PREPROCESSOR, _preprocessor(tokenizer))
        write_text(folder / CARD, _card(tokenizer))
        save_tensors(tokenizer.state_dict(), folder / WEIGHTS, {SAVE_ID: save_id})


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
