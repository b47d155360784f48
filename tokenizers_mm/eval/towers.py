"""Towers that map images and texts to one space: CLIP-like models of transformers, or a tokenizer's own contrast."""

from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from tokenizers_mm._check import fail, require
from tokenizers_mm._files import atomic_directory, write_json
from tokenizers_mm._transformers import read_dual_encoder
from tokenizers_mm.config import from_mapping, to_mapping
from tokenizers_mm.losses.captions import CaptionConfig, CaptionContrast
from tokenizers_mm.models.loading import fill, read_json, read_safetensors
from tokenizers_mm.models.saving import save_tensors

TEXTS = 64
"""Texts that are embedded at once."""

OWN = "caption_contrast"
"""Kind that the config.json of a saved `CaptionContrast` names."""


class Tower(Protocol):
    """Embeddings of images and of texts, compared by cosine similarity.

    reads_semantic: `images` takes semantic features [B, T, C] that a tokenizer decodes from its codes, not images.
    """

    @property
    def reads_semantic(self) -> bool:
        """True if `images` takes semantic features."""
        ...

    def images(self, x: Tensor) -> Tensor:
        """Images [B, 3, H, W] in [-1, 1], or semantic features -> [B, D] on the CPU."""
        ...

    def texts(self, texts: Sequence[str]) -> Tensor:
        """[N, D] on the CPU."""
        ...


class ImageTextModel:
    """A model of transformers with `get_image_features` and `get_text_features` (CLIP, SigLIP and the like).

    Images are scaled (bicubic, antialiased) to the square that the model takes, without a crop.
    """

    reads_semantic = False

    def __init__(
        self, model: Any, tokenizer: Any, mean: Sequence[float] = (0.5,) * 3, std: Sequence[float] = (0.5,) * 3
    ) -> None:
        """mean, std: of the channels of images in [0, 1]. Texts are padded to the longest, for SigLIP to the end."""
        self.model, self.tokenizer = model.eval().requires_grad_(False), tokenizer
        self.side = int(model.config.vision_config.image_size)
        self.length = int(model.config.text_config.max_position_embeddings)
        self.padding = "max_length" if model.config.model_type.startswith("siglip") else "longest"
        self.mean, self.std = (torch.tensor(v, device=model.device).view(3, 1, 1) for v in (mean, std))

    @torch.no_grad()
    def images(self, x: Tensor) -> Tensor:
        x = F.interpolate(x.to(self.mean.device), (self.side, self.side), mode="bicubic", antialias=True)
        pixels = ((x.clamp(-1, 1) + 1) / 2 - self.mean) / self.std
        return _pooled(self.model.get_image_features(pixel_values=pixels))

    @torch.no_grad()
    def texts(self, texts: Sequence[str]) -> Tensor:
        found = []
        for start in range(0, len(texts), TEXTS):
            part = list(texts[start : start + TEXTS])
            options = {"padding": self.padding, "truncation": True, "max_length": self.length}
            tokens = self.tokenizer(part, return_tensors="pt", return_token_type_ids=False, **options)
            found.append(_pooled(self.model.get_text_features(**tokens.to(self.mean.device))))
        return torch.cat(found)


def _pooled(output: Any) -> Tensor:
    """Embeddings of what `get_image_features` gives: a tensor before transformers 5, an object since."""
    found = output if isinstance(output, Tensor) else output.pooler_output
    return found.float().cpu()


class OwnTower:
    """The text tower that a tokenizer was trained with by captions; it reads the tokenizer's semantic features."""

    reads_semantic = True

    def __init__(self, contrast: CaptionContrast) -> None:
        self.contrast = contrast.eval()

    @torch.no_grad()
    def images(self, x: Tensor) -> Tensor:
        require(x.shape[-1] == self.contrast.semantic_dim, "tower", f"features of {self.contrast.semantic_dim}", x)
        return self.contrast.encode_images(x.to(self.contrast.positions.device)).float().cpu()

    @torch.no_grad()
    def texts(self, texts: Sequence[str]) -> Tensor:
        parts = [list(texts[start : start + TEXTS]) for start in range(0, len(texts), TEXTS)]
        return torch.cat([self.contrast.encode_text(part) for part in parts]).float().cpu()


def save_contrast(contrast: CaptionContrast, directory: str | Path) -> None:
    """Write a text tower that was trained by captions, for `open_tower`; atomic."""
    config = {"kind": OWN, "semantic_dim": contrast.semantic_dim, "config": to_mapping(contrast.config)}
    with atomic_directory(directory) as folder:
        write_json(folder / "config.json", config)
        save_tensors(contrast.state_dict(), folder / "model.safetensors")


@lru_cache(maxsize=1)
def open_tower(directory: str, device: str = "cpu") -> Tower:
    """A tower from a directory: `captions` of a training run, or a model of transformers; nothing is fetched.

    Raises:
        ValueError: the directory holds neither. ImportError: transformers is not installed.
    """
    path = Path(directory) / "config.json"
    require(path.is_file(), "tower", "a directory with a config.json", directory)
    data = read_json(path)
    if data.get("kind") == OWN:
        width, config = data.get("semantic_dim"), data.get("config")
        if not isinstance(width, int) or not 0 < width <= 1 << 16:
            fail(f"{path}: semantic_dim", "a whole number from 1 to 65536", width)
        if not isinstance(config, dict):
            fail(f"{path}: config", "a mapping", config)
        sizes = from_mapping(CaptionConfig, config, f"{path}: config")
        with torch.device("meta"):  # memory is taken for the tensors of the file alone
            contrast = CaptionContrast(width, sizes)
        fill(contrast, read_safetensors(path.parent / "model.safetensors"), str(path.parent))
        return OwnTower(contrast.to(device))
    model, tokenizer = read_dual_encoder(directory)
    for name in ("get_image_features", "get_text_features"):
        if not hasattr(model, name):
            fail(f"{path}: model_type", "a model of images and texts, such as clip or siglip", data.get("model_type"))
    facts = path.parent / "preprocessor_config.json"
    found = read_json(facts) if facts.is_file() else {}
    colours = (found.get(key) or [0.5] * 3 for key in ("image_mean", "image_std"))
    return ImageTextModel(model.to(device), tokenizer, *colours)
