"""Continuous features of images in place of token embeddings, for understanding.

Source: TokenFlow (arXiv 2412.03069), section 3.4, and ILLUME+ (arXiv 2504.01934): Linear, GELU, Linear per part; Harmon
(arXiv 2503.21979): SiLU.
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from torch import Tensor, nn

from tokenizers_mm._check import fail, require
from tokenizers_mm._files import atomic_directory, settle, write_json
from tokenizers_mm.config import Length, Width, from_mapping, read_json, to_mapping
from tokenizers_mm.llm.batch import Batch
from tokenizers_mm.llm.transformers_api import embeddings
from tokenizers_mm.models.loading import fill, read_safetensors
from tokenizers_mm.models.saving import save_tensors


@dataclass(frozen=True)
class ProjectorConfig:
    """dims: channels of each part of the features. width: of the language model's embeddings."""

    dims: Annotated[tuple[Width, ...], Length(1, 64)]
    width: Width
    activation: Literal["gelu", "silu"] = "gelu"


class FeatureProjector(nn.Module):
    """One small network per part of the features: [T, dims[i]] -> [T, width], in the dtype of its weights."""

    def __init__(self, config: ProjectorConfig) -> None:
        super().__init__()
        self.config = config
        activation = {"gelu": nn.GELU, "silu": nn.SiLU}[config.activation]
        self.parts = nn.ModuleList(
            nn.Sequential(nn.Linear(dim, config.width), activation(), nn.Linear(config.width, config.width))
            for dim in config.dims
        )

    def forward(self, images: Sequence[tuple[Tensor, ...]]) -> Tensor:
        """All features of all images, in order, [sum of T, width]; each part runs once over all images.

        images: for each its parts [T, dims[i]]. Raises: ValueError for parts of other channels.
        """
        for parts in images:
            dims = tuple(part.shape[-1] for part in parts)
            require(dims == self.config.dims, "features", f"parts of {self.config.dims} channels", dims)
        if not images:
            return torch.zeros(0, self.config.width, device=self._like.device, dtype=self._like.dtype)
        columns = []
        for index, network in enumerate(self.parts):
            column = [parts[index].to(self._like.dtype) for parts in images]
            columns.append(network(torch.cat(column)).split([len(part) for part in column]))
        return torch.cat([part for parts in zip(*columns, strict=True) for part in parts])

    def save(self, directory: str | os.PathLike[str]) -> None:
        """Write projector.json and projector.safetensors, as a set."""
        with atomic_directory(directory) as folder:
            write_json(folder / "projector.json", to_mapping(self.config))
            save_tensors(self.state_dict(), folder / "projector.safetensors")

    @classmethod
    def load(cls, directory: str | os.PathLike[str]) -> "FeatureProjector":
        """Read what `save` wrote; ValueError for files that are missing or of something else."""
        settle(directory)
        path = Path(directory) / "projector.json"
        config = from_mapping(ProjectorConfig, read_json(path), str(path))
        with torch.device("meta"):  # memory is taken for the tensors of the file alone
            projector = cls(config)
        path = path.with_suffix(".safetensors")
        fill(projector, read_safetensors(path), str(path))
        return projector

    @property
    def _like(self) -> Tensor:
        return next(self.parameters())


def embed(model: Any, batch: Batch, projector: FeatureProjector) -> dict[str, Tensor]:
    """Inputs of a `transformers` causal language model: token embeddings, with projected features in their places.

    Differentiable in the projector, and in the features where they are.
    """
    projected = projector(batch.features)
    places = int(batch.is_feature.sum())
    if places != projected.shape[0]:
        fail("features", f"{places} vectors, one for each place", f"{projected.shape[0]}")
    embedded = embeddings(model)(batch.input_ids)
    embedded = embedded.masked_scatter(batch.is_feature[..., None], projected.to(embedded.dtype))
    inputs = {"inputs_embeds": embedded, "attention_mask": batch.attention_mask, "labels": batch.labels}
    return {**inputs, "position_ids": batch.position_ids}
