"""Samples of a finished MAR run: drawn images, and the share of captions whose colour is drawn right."""

import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tokenizers_mm._images import image_to_tensor, tensor_to_images
from tokenizers_mm.data.photographs import photographs
from tokenizers_mm.data.scenes import Scene, make_scene, scene_images
from tokenizers_mm.data.transforms import random_patch
from tokenizers_mm.eval.pictures import comparison_grid, plot_curves, save_picture, write_pictures
from tokenizers_mm.eval.scenes import judge_scene
from tokenizers_mm.models.mar_sampling import Plan, draw_noise, plan_all, plan_masked, sample

from ..config import RunConfig
from ..log import read_log
from .mar import Generator

SHOWN = 16


@torch.no_grad()
def draw_scenes(run: RunConfig, model: Generator, folder: Path) -> dict[str, Any]:
    """Images drawn from held-out captions, lower halves filled in, and the share of right colours.

    Leaves samples.png (each image over its caption), lower_halves.png and autoencoder.png (originals over
    reconstructions) in the folder; nothing without `scenes`.
    """
    config, tokenizer = run.objective, model.tokenizer
    if not config.scenes:
        return {}
    side = config.data.image_size[0]
    scenes = [make_scene(index, "heldout") for index in range(config.scenes)]
    captions = [scene.caption for scene in scenes]
    real = scene_images(scenes, side).to(tokenizer.device)
    generator = torch.Generator().manual_seed(run.seed)
    plan = plan_all(tokenizer, len(scenes), tokenizer.grid(*real.shape[-2:]), generator)
    drawn = _draw(run, model, captions, plan, generator)
    decoded = tokenizer.decode(tokenizer.encode(real)).clamp(-1, 1)

    shown = list(zip(tensor_to_images(drawn[:SHOWN]), captions[:SHOWN], strict=True))
    write_pictures(folder / "samples.png", shown, zoom=max(1, 192 // side))
    given, told = _to_fill(run, real[:SHOWN], captions[:SHOWN])
    filled = _fill_lower_halves(run, model, given, told, generator)
    save_picture(comparison_grid(given, filled, zoom=2), folder / "lower_halves.png")
    save_picture(comparison_grid(real[:SHOWN], decoded[:SHOWN], zoom=2), folder / "autoencoder.png")
    return {
        "scenes": len(scenes),
        "right_colour_real": _right_colours(real, scenes),
        "right_colour_decoded": _right_colours(decoded, scenes),
        "right_colour_sampled": _right_colours(drawn, scenes),
    }


def draw_curves(folder: Path) -> None:
    """Leave curves.png of all that log.jsonl in the folder tells, if it tells anything."""
    curves: dict[str, list[tuple[float, float]]] = {}
    for line in read_log(folder / "log.jsonl") if (folder / "log.jsonl").exists() else []:
        first = "autoencoder " if line.get("stage") == 0 else ""
        for name in line.keys() - {"step", "seconds", "stage", "latent_scale"}:
            curves.setdefault(first + name, []).append((line["step"], line[name]))
    if curves:
        plot_curves(dict(sorted(curves.items())), folder / "curves.png")


def _draw(run: RunConfig, model: Generator, captions: Sequence[str], plan: Plan, generator: torch.Generator) -> Tensor:
    """Images [B, 3, H, W] in [-1, 1] for captions, with the tokens of the plan filled in."""
    tokenizer, options, side = model.tokenizer, run.objective.sampling, run.objective.data.image_size[0]
    grid = tokenizer.grid(side, side)
    condition = model.condition(captions)
    if options.guidance != 1:
        condition = torch.cat([condition, tokenizer.encoder.no_class.expand_as(condition)])

    def encode(tokens: Tensor, mask: Tensor) -> Tensor:
        return tokenizer.encoder(tokens, grid, mask, condition)

    noise = draw_noise(tokenizer.autoencoder.dim, generator, tokenizer.device)
    tokens = sample(tokenizer, encode, grid, plan, options, noise)
    return tokenizer.decode(tokenizer.latents(tokens.to(tokenizer.dtype), grid)).clamp(-1, 1)


def _fill_lower_halves(
    run: RunConfig, model: Generator, x: Tensor, captions: Sequence[str], generator: torch.Generator
) -> Tensor:
    """The images with the tokens of their lower half hidden and drawn anew."""
    values = model.tokenizer.encode(x).values
    half = torch.zeros(values.shape[:2], dtype=torch.bool, device=values.device)
    half[:, values.shape[1] // 2 :] = True
    return _draw(run, model, captions, plan_masked(values, half, generator), generator)


def _to_fill(run: RunConfig, scenes: Tensor, captions: list[str]) -> tuple[Tensor, list[str]]:
    """Scenes; where the run learned from photographs half of them make room for patches of held-out photographs."""
    zooms = [source.zoom for source in run.objective.data.sources if source.kind == "photographs"]
    if not zooms:
        return scenes, captions
    count = (len(scenes) + 1) // 2
    rng, pictures = random.Random(run.seed), list(photographs("heldout").values())
    side = run.objective.data.image_size
    patches = [random_patch(pictures[index % len(pictures)], side, rng, zooms[0]) for index in range(count)]
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
