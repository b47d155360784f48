"""A language model that reads images as MAR features and writes them through MAR (Harmon, arXiv 2503.21979).

    model = ContinuousLM(tokenizer, language_model)          # any causal language model of transformers
    prompt = model.prompt_of(processor(rows, end=False))     # text, with images as features
    model.answer(prompt)                                     # image -> text
    model.generate(prompt, SamplingConfig(...))              # text -> image: tokens for tokenizer.latents
    model(TextBatch(...)), model(ImageBatch(...))            # the terms of both losses

An image is [tokens, row-major | buffers] in the language model's sequence, for reading and for writing alike.
"""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tokenizers_mm._check import fail, require
from tokenizers_mm._files import atomic_directory, settle, write_json
from tokenizers_mm.functional.gradients import scale_gradient
from tokenizers_mm.llm.batch import IGNORED, Batch, Segment
from tokenizers_mm.llm.positions import counted
from tokenizers_mm.llm.presets import ChatFormat
from tokenizers_mm.llm.projector import FeatureProjector, ProjectorConfig, embed
from tokenizers_mm.llm.transformers_api import (
    cache_of,
    decoder,
    embeddings,
    forward,
    head,
    keep_for_rewind,
    load_language_model,
    rewind,
)
from tokenizers_mm.models.loading import load_directory, read_config, read_safetensors
from tokenizers_mm.models.mar import MAR, Grid, MARDraws, buffers_first, buffers_last
from tokenizers_mm.models.mar_sampling import Noise, Plan, SamplingConfig, draw_noise, plan_all, sample
from tokenizers_mm.models.saving import CONFIG, FORMAT, save_tensors
from tokenizers_mm.types import ImageLatents

KIND, PROJECTORS = "continuous_lm", "projectors.safetensors"
"""Kind of a saved `ContinuousLM` in config.json, and the file of its projectors."""

PLACEHOLDER = -200
"""Stands in input ids for one vector of an image; no token has this id."""

CHAT = ChatFormat(system="")
"""Harmon's conversations: Qwen's frame, without a system text."""

TEXT_GRADIENT = 0.1
"""Share of the gradient of the text loss that reaches the projector and MAR (Harmon, section 3.3)."""


@dataclass(frozen=True)
class Prompt:
    """Prompt embeddings float [R, T, H], and attention mask bool [R, T], False for padding (at either end)."""

    embeddings: Tensor
    mask: Tensor


@dataclass(frozen=True)
class TextBatch:
    """Image to text: int64 [B, T] ids with PLACEHOLDER for images, bool mask, int64 labels (IGNORED: not learned)."""

    input_ids: Tensor
    mask: Tensor
    labels: Tensor
    latents: ImageLatents


@dataclass(frozen=True)
class ImageBatch:
    """Text to image: int64 [B, T] ids and bool mask of the prompts, the images' latents, and the chance of the step."""

    input_ids: Tensor
    mask: Tensor
    latents: ImageLatents
    draws: MARDraws


class ContinuousLM(nn.Module):
    """A MAR tokenizer, a causal language model, and a projector each way (Linear, SiLU, Linear)."""

    def __init__(self, tokenizer: MAR, language_model: Any) -> None:
        super().__init__()
        width, dim = embeddings(language_model).embedding_dim, tokenizer.feature_dim
        self.tokenizer, self.language_model = tokenizer, language_model
        self.projector = FeatureProjector(ProjectorConfig((dim,), width, "silu"))
        self.proj_out = nn.Sequential(nn.Linear(width, width), nn.SiLU(), nn.Linear(width, dim))

    @property
    def proj_in(self) -> nn.Module:
        """MAR's channels to the language model's."""
        return self.projector.parts[0]

    def load_projectors(self, tensors: Mapping[str, Tensor]) -> None:
        """Fill both projectors; `tensors` are `proj_in.0.weight` and so on, exactly these."""
        for name in tensors:
            require(name.startswith(("proj_in.", "proj_out.")), "projectors", "proj_in.* and proj_out.*", name)
        for name in ("proj_in", "proj_out"):
            part = {n.removeprefix(f"{name}."): t for n, t in tensors.items() if n.startswith(f"{name}.")}
            try:
                getattr(self, name).load_state_dict(part)
            except RuntimeError as error:
                fail("projectors", f"the tensors of {name} with their shapes", " ".join(str(error).split()))

    def save(self, directory: str | os.PathLike[str]) -> None:
        """Write `tokenizer` and `language_model`, each in its own format, projectors.safetensors and config.json."""
        with atomic_directory(directory) as folder:
            write_json(folder / CONFIG, {"library": "tokenizers_mm", "format": FORMAT, "kind": KIND})
            self.tokenizer.save(folder / "tokenizer")
            self.language_model.save_pretrained(folder / "language_model")
            parts = {"proj_in": self.proj_in, "proj_out": self.proj_out}
            tensors = {f"{name}.{key}": t for name, part in parts.items() for key, t in part.state_dict().items()}
            save_tensors(tensors, folder / PROJECTORS)

    @classmethod
    def load(cls, directory: str | os.PathLike[str]) -> "ContinuousLM":
        """Read what `save` wrote, in evaluation mode; ValueError names the first file that is missing or foreign."""
        folder = Path(directory)
        settle(folder)
        kind = read_config(folder / CONFIG).get("kind")
        require(kind == KIND, f"{folder / CONFIG}: kind", KIND, repr(kind))
        tokenizer = load_directory(folder / "tokenizer")
        if not isinstance(tokenizer, MAR):
            fail(str(folder / "tokenizer"), "a MAR tokenizer", tokenizer.family)
        place = folder / "language_model"
        language_model = load_language_model(place, str(place), local=True)
        model = cls(tokenizer, language_model)
        model.load_projectors(read_safetensors(folder / PROJECTORS))
        return model.eval()

    def read(self, latents: ImageLatents) -> Tensor:
        """The vectors [B, h * w + num_buffers, H] that stand for images, differentiable."""
        encoded = self.tokenizer.encoder(latents.values, latents.grid)
        return self.proj_in(buffers_last(encoded, self.tokenizer.num_buffers))

    def prompt_of(self, batch: Batch) -> Prompt:
        """Embeddings of the rows of a `MultimodalProcessor`, images among them as features."""
        return Prompt(embed(self.language_model, batch, self.projector)["inputs_embeds"], batch.attention_mask.bool())

    def prompt(
        self, input_ids: Tensor, mask: Tensor, latents: ImageLatents | None = None, gradient: float = 1.0
    ) -> Prompt:
        """Embeddings of int64 ids [R, T], images in the places of PLACEHOLDER, in order.

        gradient: what the images' vectors let through of their gradient.
        """
        require(mask.shape == input_ids.shape, "mask", f"bool {list(input_ids.shape)}", mask)
        places = input_ids == PLACEHOLDER
        embedded = embeddings(self.language_model)(input_ids.masked_fill(places, 0))
        vectors = embedded.new_zeros(0, embedded.shape[-1])
        if latents is not None:
            vectors = scale_gradient(self.read(latents), gradient).flatten(0, 1).to(embedded.dtype)
        expected = f"{len(vectors)} places of images in all"
        require(int(places.sum()) == len(vectors), "input_ids", expected, f"{int(places.sum())}")
        return Prompt(embedded.masked_scatter(places[..., None], vectors), mask.bool())

    def forward(self, batch: TextBatch | ImageBatch) -> dict[str, Tensor]:
        """Unweighted terms: `text` (cross-entropy of the labels), or `noise` and `bound` of MAR's loss."""
        if isinstance(batch, TextBatch):
            return {"text": self._text_term(batch)}
        tokens, grid, mask = batch.latents.values.detach(), batch.latents.grid, batch.draws.mask
        encoded = self.tokenizer.encoder(tokens, grid, mask)
        encoded = self._add_residual(_Prefix(self.prompt(batch.input_ids, batch.mask)), encoded)
        terms = self.tokenizer.terms(self.tokenizer.decoder(encoded, grid, mask), tokens, batch.draws)
        return {"noise": terms.noise, "bound": terms.bound}

    @torch.no_grad()
    def answer(self, prompt: Prompt, max_new_tokens: int = 128) -> Tensor:
        """Token ids [R, n] that go on after the prompts, greedily; prompts of unequal length are padded on the left."""
        return self.language_model.generate(
            inputs_embeds=prompt.embeddings,
            attention_mask=prompt.mask.long(),
            max_new_tokens=max_new_tokens,
            do_sample=False,
        )

    @torch.no_grad()
    def generate(
        self,
        prompt: Prompt,
        config: SamplingConfig,
        generator: torch.Generator | None = None,
        *,
        grid: Grid | None = None,
        plan: Plan | None = None,
        noise: Noise | None = None,
        cache: bool = True,
    ) -> Tensor:
        """Image tokens [B, h * w, D] after the prompts; `tokenizer.latents(tokens, grid)` makes them decodable.

        Under guidance the prompt holds the B conditional rows and then the B unconditional ones. All chance comes from
        the generator, or from an explicit plan and noise. cache: keep the prompt's keys and values between steps;
        without it everything is computed again in each, with the same result.
        """
        shape = grid or self.tokenizer.config.encoder.grid
        rows, copies = len(prompt.mask), 1 if config.guidance == 1 else 2
        batch = rows // copies if plan is None else len(plan.tokens)
        expected = f"{batch * copies} rows" + (" (conditional, then as many unconditional)" if copies == 2 else "")
        require(rows == batch * copies, "prompt", expected, f"{rows}")
        plan = plan_all(self.tokenizer, batch, shape, generator) if plan is None else plan
        if noise is None:
            noise = draw_noise(self.tokenizer.config.encoder.token_dim, generator, self.tokenizer.device)
        prefix = self._prefill(prompt) if cache else _Prefix(prompt)

        def encode(tokens: Tensor, mask: Tensor) -> Tensor:
            return self._add_residual(prefix, self.tokenizer.encoder(tokens, shape, mask))

        return sample(self.tokenizer, encode, shape, plan, config, noise)

    def _text_term(self, batch: TextBatch) -> Tensor:
        prompt = self.prompt(batch.input_ids, batch.mask, batch.latents, TEXT_GRADIENT)
        hidden, to_logits = self._run(prompt.embeddings, prompt.mask, 0), head(self.language_model)
        if to_logits is None:
            fail("language_model", "one with a head", type(self.language_model).__name__)
        logits = to_logits(hidden[:, :-1])
        return F.cross_entropy(logits.float().flatten(0, 1), batch.labels[:, 1:].flatten(), ignore_index=IGNORED)

    def _add_residual(self, prefix: "_Prefix", encoded: Tensor) -> Tensor:
        """MAR's encoder output [R, buffers + n, C] plus what the language model says of it after the prompt."""
        count = self.tokenizer.num_buffers
        prompt = prefix.prompt
        vectors = self.proj_in(buffers_last(encoded, count)).to(prompt.embeddings.dtype)
        mask = torch.cat([prompt.mask, prompt.mask.new_ones(vectors.shape[:2])], dim=1)
        length = prompt.mask.shape[1]
        if prefix.keys is None:
            hidden = self._run(torch.cat([prompt.embeddings, vectors], dim=1), mask, 0)[:, length:]
        else:
            hidden = self._run(vectors, mask, length, prefix.keys)
            rewind(prefix.keys, vectors.shape[1])
        return encoded + buffers_first(self.proj_out(hidden.to(encoded.dtype)), count)

    def _prefill(self, prompt: Prompt) -> "_Prefix":
        """The prompt's keys and values, computed once."""
        output = self._call(prompt.embeddings, prompt.mask, 0, use_cache=True)
        return _Prefix(prompt, keep_for_rewind(cache_of(output)))

    def _run(self, vectors: Tensor, mask: Tensor, start: int, keys: Any = None) -> Tensor:
        """Last hidden states of embeddings that follow `start` cached ones; the mask covers both."""
        return self._call(vectors, mask, start, keys, use_cache=keys is not None).last_hidden_state

    def _call(self, vectors: Tensor, mask: Tensor, start: int, keys: Any = None, *, use_cache: bool) -> Any:
        inputs = {"inputs_embeds": vectors, "attention_mask": mask.long(), "position_ids": counted(mask)[:, start:]}
        return forward(decoder(self.language_model), inputs, cache=keys, use_cache=use_cache)


@dataclass(frozen=True)
class _Prefix:
    """A prompt and, where they are kept, its keys and values."""

    prompt: Prompt
    keys: Any = None


def image_requests(captions: Sequence[str], guided: bool) -> list[str]:
    """Harmon's requests for images, as rows for a processor; under guidance the unconditional ones follow."""
    requests = [CHAT.prompt(f"Generate an image: {caption}") for caption in captions]
    return requests + [CHAT.prompt("Generate an image.")] * (len(captions) if guided else 0)


def question_row(image: object, question: str) -> list[object]:
    """Harmon's question about an image, as a row for a processor."""
    after = "\n" + question + CHAT.user[1] + CHAT.assistant[0]
    return [CHAT.user[0], Segment(image, learn=False, as_features=True), after]
