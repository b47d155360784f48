"""Models of images and texts of `transformers`, read from a directory: no code of it is run, nothing is fetched."""

from typing import Any


def read_dual_encoder(directory: str) -> tuple[Any, Any]:
    """The model and its text tokenizer, weights in safetensors alone; the errors are those of transformers."""
    from transformers import AutoModel, AutoTokenizer  # an extra: loaded when asked for

    options = {"trust_remote_code": False, "local_files_only": True}
    return AutoModel.from_pretrained(directory, use_safetensors=True, **options), AutoTokenizer.from_pretrained(
        directory, **options
    )
