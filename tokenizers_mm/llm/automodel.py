"""A tokenizer as a model of `transformers`, thin: `AutoModel.from_pretrained` of a directory that `save` wrote.

    import tokenizers_mm.llm.automodel  # registers the kind with AutoConfig and AutoModel
    model = AutoModel.from_pretrained("my_tokenizer")
    pixels = AutoImageProcessor.from_pretrained("my_tokenizer")(images, return_tensors="pt")["pixel_values"]
    ids = model.get_image_tokens(pixels)

Files are read and written by this library: strict, and nothing of theirs is executed. The module imports transformers.
"""

import os
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModel, PretrainedConfig, PreTrainedModel

from tokenizers_mm._check import fail, require
from tokenizers_mm.models.base import ImageTokenizer
from tokenizers_mm.models.loading import load
from tokenizers_mm.models.saving import MODEL_TYPE
from tokenizers_mm.types import ImageCodes, ImageLatents

OF_THE_HUB = frozenset(
    {
        *("cache_dir", "force_download", "local_files_only", "proxies", "resume_download", "subfolder", "token"),
        *("use_auth_token", "trust_remote_code", "code_revision", "adapter_kwargs", "_from_auto", "_commit_hash"),
    }
)
"""Options with which `AutoModel` calls a model and that have no meaning for these files."""


class VisualTokenizerConfig(PretrainedConfig):
    """The entries of a tokenizer's config.json: `family`, `config` and `provenance` among them."""

    model_type = MODEL_TYPE

    def __init__(self, **entries: Any) -> None:
        super().__init__(**entries)


class VisualTokenizer(PreTrainedModel):
    """An image tokenizer, as `tokenizer`, with the methods that multimodal models of transformers have."""

    config_class = VisualTokenizerConfig
    base_model_prefix = "tokenizer"
    main_input_name = "pixel_values"
    _no_split_modules: list[str] = []

    def __init__(self, config: VisualTokenizerConfig, tokenizer: ImageTokenizer | None = None) -> None:
        super().__init__(config)
        if tokenizer is None:
            fail("tokenizer", "an image tokenizer (VisualTokenizer.from_pretrained loads one)", "None")
        self.tokenizer = tokenizer

    @classmethod
    def from_pretrained(  # type: ignore[override]
        cls,
        source: str | os.PathLike[str],
        *,
        config: Any = None,
        revision: str | None = None,
        dtype: torch.dtype | str | None = None,
        device_map: str | torch.device | None = None,
        **options: Any,
    ) -> "VisualTokenizer":
        """A directory that `save` wrote, a hub id, or a shipped tokenizer; in evaluation mode.

        config: ignored, config.json counts. dtype: of the weights, None or "auto" for that of the file. device_map: one
        device, "auto" or None for the CPU.
        """
        unknown = sorted(set(options) - OF_THE_HUB - {"torch_dtype"})
        require(not unknown, "options", "revision, dtype and device_map", unknown)
        require(not options.get("trust_remote_code"), "trust_remote_code", "False (nothing is executed)", True)
        dtype = options.get("torch_dtype") if dtype is None else dtype
        dtype = getattr(torch, dtype) if isinstance(dtype, str) and dtype != "auto" else dtype
        place = None if device_map in (None, "auto") else device_map
        tokenizer = load(source, revision, place)  # type: ignore[arg-type]
        tokenizer = tokenizer.to(dtype) if isinstance(dtype, torch.dtype) else tokenizer
        made = VisualTokenizerConfig(family=tokenizer.family, dtype=tokenizer.dtype)
        return cls(made, tokenizer).eval()

    def save_pretrained(self, save_directory: str | os.PathLike[str], **options: Any) -> None:  # type: ignore[override]
        """Write the files of the tokenizer's `save`."""
        self.tokenizer.save_pretrained(save_directory, **options)

    @torch.no_grad()
    def get_image_tokens(self, pixel_values: Tensor) -> Tensor:
        """Ids int64 [B, L] of images [B, 3, H, W] in [-1, 1]: all streams, each coarse to fine, row-major."""
        codes = self.tokenizer.encode(pixel_values)
        if isinstance(codes, ImageLatents):
            fail("model", "a tokenizer with ids", f"{self.tokenizer.family}, which has latents")
        return codes.ids

    @torch.no_grad()
    def decode_image_tokens(self, image_tokens: Tensor, height: int | None = None, width: int | None = None) -> Tensor:
        """Images float [B, 3, H, W] of ids [B, L]; the size may be left out where the tokenizer takes one."""
        return self.tokenizer.decode_ids(image_tokens, height, width)

    @torch.no_grad()
    def get_image_features(self, pixel_values: Tensor) -> Tensor:
        """[B, T, C] of images [B, 3, H, W]: what a language model reads for understanding."""
        return self.tokenizer.features(pixel_values)

    def forward(self, pixel_values: Tensor) -> ImageCodes | ImageLatents:
        """Codes of images [B, 3, H, W] in [-1, 1]."""
        return self.tokenizer.encode(pixel_values)


AutoConfig.register(MODEL_TYPE, VisualTokenizerConfig, exist_ok=True)
AutoModel.register(VisualTokenizerConfig, VisualTokenizer, exist_ok=True)
