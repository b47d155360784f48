"""Drawings of a MAR model from captions: images of held-out scenes, and the share whose colour is drawn right."""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tokenizers_mm._images import image_to_tensor, tensor_to_images
from tokenizers_mm.data.photographs import photographs
from tokenizers_mm.data.scenes import Scene, make_scene, scene_images
from tokenizers_mm.data.transforms import random_patch
from tokenizers_mm.eval.pictures import comparison_grid, save_picture, write_pictures
from tokenizers_mm.eval.scenes import judge_scene
from tokenizers_mm.models.mar import MAR
from tokenizers_mm.models.mar_sampling import Plan, SamplingConfig, draw_noise, plan_all, plan_masked, sample

SHOWN = 16


@dataclass(frozen=True)
class Drawer:
    """A MAR tokenizer that draws square images of `side` pixels; `condition` maps captions to vectors [B, C]."""

    tokenizer: MAR
    condition: Callable[[Sequence[str]], Tensor]
    sampling: SamplingConfig
    side: int

    @torch.no_grad()
    def draw(self, captions: Sequence[str], generator: torch.Generator, plan: Plan | None = None) -> Tensor:
        """Images [B, 3, H, W] in [-1, 1] for captions, with the tokens of the plan (by default all) filled in."""
        tokenizer, grid = self.tokenizer, self.tokenizer.grid(self.side, self.side)
        plan = plan_all(tokenizer, len(captions), grid, generator) if plan is None else plan
        condition = self.condition(captions)
        if self.sampling.guidance != 1:
            condition = torch.cat([condition, tokenizer.encoder.no_class.expand_as(condition)])

        def encode(tokens: Tensor, mask: Tensor) -> Tensor:
            return tokenizer.encoder(tokens, grid, mask, condition)

        noise = draw_noise(tokenizer.autoencoder.dim, generator, tokenizer.device)
        tokens = sample(tokenizer, encode, grid, plan, self.sampling, noise)
        return tokenizer.decode(tokenizer.latents(tokens.to(tokenizer.dtype), grid)).clamp(-1, 1)

    @torch.no_grad()
    def fill_lower_halves(self, x: Tensor, captions: Sequence[str], generator: torch.Generator) -> Tensor:
        """The images with the tokens of their lower half hidden and drawn anew."""
        values = self.tokenizer.encode(x).values
        half = torch.zeros(values.shape[:2], dtype=torch.bool, device=values.device)
        half[:, values.shape[1] // 2 :] = True
        return self.draw(captions, generator, plan_masked(values, half, generator))


def draw_scenes(
    drawer: Drawer, count: int, seed: int, folder: Path, zoom: tuple[float, float] | None = None
) -> dict[str, Any]:
    """Images drawn from held-out captions, lower halves filled in, and the share of right colours.

    Leaves samples.png (each image over its caption), lower_halves.png and autoencoder.png (originals over
    reconstructions) in the folder. zoom: of patches of held-out photographs that take the place of half of the scenes
    in lower_halves.png; None takes scenes alone.
    """
    tokenizer, side = drawer.tokenizer, drawer.side
    scenes = [make_scene(index, "heldout") for index in range(count)]
    captions = [scene.caption for scene in scenes]
    real = scene_images(scenes, side).to(tokenizer.device)
    generator = torch.Generator().manual_seed(seed)
    drawn = drawer.draw(captions, generator)
    with torch.no_grad():
        decoded = tokenizer.decode(tokenizer.encode(real)).clamp(-1, 1)

    shown = list(zip(tensor_to_images(drawn[:SHOWN]), captions[:SHOWN], strict=True))
    write_pictures(folder / "samples.png", shown, zoom=max(1, 192 // side))
    given, told = _with_photographs(real[:SHOWN], captions[:SHOWN], seed, zoom)
    filled = drawer.fill_lower_halves(given, told, generator)
    save_picture(comparison_grid(given, filled, zoom=2), folder / "lower_halves.png")
    save_picture(comparison_grid(real[:SHOWN], decoded[:SHOWN], zoom=2), folder / "autoencoder.png")
    return {
        "scenes": len(scenes),
        "right_colour_real": _right_colours(real, scenes),
        "right_colour_decoded": _right_colours(decoded, scenes),
        "right_colour_sampled": _right_colours(drawn, scenes),
    }


def _with_photographs(
    scenes: Tensor, captions: list[str], seed: int, zoom: tuple[float, float] | None
) -> tuple[Tensor, list[str]]:
    """Scenes, half of them replaced by patches of held-out photographs where there is a zoom."""
    if zoom is None:
        return scenes, captions
    count = (len(scenes) + 1) // 2
    rng, pictures = random.Random(seed), list(photographs("heldout").values())
    size = (scenes.shape[-2], scenes.shape[-1])
    patches = [random_patch(pictures[index % len(pictures)], size, rng, zoom) for index in range(count)]
    photos = torch.stack([image_to_tensor(patch) for patch in patches]).to(scenes.device)
    kept = len(scenes) - count
    return torch.cat([scenes[:kept], photos]), [*captions[:kept], *[""] * count]


def _right_colours(images: Tensor, scenes: Sequence[Scene]) -> float:
    """Share of images whose largest object has the colour that it has in the scene."""
    judged = [judge_scene(picture) for picture in tensor_to_images(images)]
    right = [
        found is not None and found[1] == scene.objects[0].colour for found, scene in zip(judged, scenes, strict=True)
    ]
    return sum(right) / len(right)
