"""The demo's first half: a small two-codebook tokenizer is trained, measured on held-out images, saved and loaded."""

import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import tokenizers_mm as tmm
from tokenizers_mm._check import fail
from tokenizers_mm._images import image_to_tensor
from tokenizers_mm.data.photographs import fixed_crops
from tokenizers_mm.data.scenes import COLOURS, SHAPES, Scene, make_scene, scene_images
from tokenizers_mm.eval.codebook import codebook_health
from tokenizers_mm.eval.image import psnr, ssim
from tokenizers_mm.eval.pictures import comparison_grid, plot_curves, save_picture
from tokenizers_mm.eval.semantics import linear_probe
from tokenizers_mm.eval.validation import reconstruct
from tokenizers_mm.models import ImageTokenizer

from ..config import RunConfig
from ..log import read_log
from ..loop import run

NUM_CROPS, NUM_PROBE_TRAIN, NUM_PROBE_TEST = 96, 6400, 960


def train_tokenizer(config: RunConfig, out: Path) -> tuple[ImageTokenizer[Any], dict[str, Any]]:
    """Train, save and load; returns the loaded tokenizer and numbers of the training."""
    state = run(config)
    trained = state.averaged.eval()
    trained.save(out / "tokenizer")
    tokenizer = tmm.load(out / "tokenizer")
    _curves(out / "training" / "log.jsonl", out / "curves.png")
    report = {
        "roundtrip_max_abs": _roundtrip(trained, tokenizer, _crops(tokenizer, NUM_CROPS)),
        "train_seconds": state.seconds,
        "train_steps": state.step,
    }
    return tokenizer, report


def measure_tokenizer(
    tokenizer: ImageTokenizer[Any],
    out: Path,
    num_crops: int | None = None,
    probes: tuple[int, int] | None = None,
) -> dict[str, Any]:
    """Reconstruction of held-out crops, use of the codes and linear probes; leaves reconstructions.png in `out`.

    num_crops, probes: numbers of crops, and of scenes to fit the probes and to test them; None for the usual ones.
    """
    crops = _crops(tokenizer, num_crops or NUM_CROPS)
    probes = probes or (NUM_PROBE_TRAIN, NUM_PROBE_TEST)
    side = crops.shape[-1]
    decoded, codes = reconstruct(tokenizer, crops)
    train_scenes, test_scenes = _balanced(probes[0]), _balanced(probes[1], start=1 << 30)
    scene_codes = _encode_scenes(tokenizer, test_scenes, side)
    stream = codes[0].streams[0]
    save_picture(comparison_grid(crops[:32], decoded[:32], zoom=2), out / "reconstructions.png")
    return {
        "psnr_heldout": float(psnr(crops, decoded).mean()),
        "ssim_heldout": float(ssim(crops, decoded).mean()),
        "codebook_usage": codebook_health([*codes, *scene_codes])[stream.name]["usage"],
        "codebook_usage_crops": codebook_health(codes)[stream.name]["usage"],
        **_probe(tokenizer, train_scenes, test_scenes, side),
        "ids_per_image": stream.num_ids,
        "bits_per_id": math.log2(stream.codebook_size),
        "heldout_crops": len(crops),
    }


def _crops(tokenizer: ImageTokenizer[Any], count: int) -> Tensor:
    side = image_size(tokenizer)[0]
    return torch.stack([image_to_tensor(crop) for crop in fixed_crops("heldout", count, side)])


def image_size(tokenizer: ImageTokenizer[Any]) -> tuple[int, int]:
    """(height, width) of a tokenizer of one size."""
    size = tokenizer.image_size
    return size if size is not None else fail("tokenizer", "one of a fixed size", "one of any size")


def _roundtrip(trained: ImageTokenizer[Any], loaded: ImageTokenizer[Any], images: Tensor) -> float:
    """Largest difference between the trained model's reconstruction and what the loaded one decodes from ids alone."""
    with torch.no_grad():
        codes = trained.encode(images)
        return float((trained(images).image - loaded.decode_ids(codes.ids)).abs().max())


def _balanced(count: int, start: int = 0) -> list[Scene]:
    """Held-out scenes in which every pair of shape and colour is the largest object's equally often."""
    per_class = count // (len(SHAPES) * len(COLOURS))
    left = {(shape, colour): per_class for shape in SHAPES for colour in COLOURS}
    scenes, index = [], start
    while len(scenes) < per_class * len(left):
        scene = make_scene(index, "heldout")
        key = (scene.objects[0].shape, scene.objects[0].colour)
        if left[key] > 0:
            left[key] -= 1
            scenes.append(scene)
        index += 1
    return scenes


def _encode_scenes(tokenizer: ImageTokenizer[Any], scenes: list[Scene], side: int) -> list[tmm.ImageCodes]:
    return [tokenizer.encode(part) for part in scene_images(scenes, side).split(64)]


def _probe(tokenizer: ImageTokenizer[Any], train: list[Scene], test: list[Scene], side: int) -> dict[str, float]:
    """Accuracy of linear probes for shape and colour of the largest object on the semantic and on the pixel vectors.

    A scene counts as right when both are right.
    """
    semantic_dim = tokenizer.config.quantizer.dims[0]
    features = {}
    for name, scenes in (("train", train), ("test", test)):
        with torch.no_grad():
            features[name] = torch.cat([tokenizer.vectors(c) for c in _encode_scenes(tokenizer, scenes, side)])
    result: dict[str, float] = {}
    for part, name in ((slice(None, semantic_dim), ""), (slice(semantic_dim, None), "_pixel")):
        x, y = (features[split][..., part].flatten(1) for split in ("train", "test"))
        right = torch.ones(len(test), dtype=torch.bool)
        for task, classes in (("shape", SHAPES), ("colour", tuple(COLOURS))):
            labels = [
                torch.tensor([classes.index(getattr(s.objects[0], task)) for s in scenes]) for scenes in (train, test)
            ]
            hits = linear_probe((x, labels[0]), (y, labels[1]), len(classes))
            result[f"probe_{task}{name}"] = float(hits.double().mean())
            right &= hits
        result[f"probe_accuracy{name}"] = float(right.double().mean())
    return result


def _curves(log: Path, path: Path) -> None:
    lines = read_log(log)
    names = ("psnr", "pixel", "semantic", "commitment", "usage_shared", "lr")
    plot_curves({name: [(line["step"], line[name]) for line in lines if name in line] for name in names}, path)
