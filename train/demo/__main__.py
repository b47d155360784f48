"""The demo: train a small two-codebook tokenizer, measure it on what it never saw, save it, load it, look at it.

Then a small language model learns to read and to write its codes (`language_model`, `judgement`).
"""

import argparse
import math
import sys
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import tokenizers_mm as tmm
from tokenizers_mm._files import write_json
from tokenizers_mm._images import image_to_tensor
from tokenizers_mm.data.photographs import fixed_crops
from tokenizers_mm.data.scenes import COLOURS, SHAPES, Scene, make_scene, scene_images
from tokenizers_mm.eval.codebook import codebook_health
from tokenizers_mm.eval.image import psnr, ssim
from tokenizers_mm.eval.pictures import comparison_grid, plot_curves, save_picture
from tokenizers_mm.eval.report import reconstruct
from tokenizers_mm.eval.semantics import linear_probe
from tokenizers_mm.models import ImageTokenizer

from ..config import read_config
from ..log import read_log
from ..loop import run

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
BRIDGE_SECONDS = 580.0
NUM_CROPS, NUM_PROBE_TRAIN, NUM_PROBE_TEST = 96, 6400, 960


def demo(out: Path, quick: bool = False) -> dict[str, Any]:
    """Run all of it; leaves the tokenizer, the language model, pictures and summary.json in `out`; returns the summary.

    quick: an eighth of the time, for a first look. Without `transformers` it ends with the tokenizer.
    """
    config = read_config(str(CONFIGS / "demo.yaml"), [f"out={out / 'training'}"])
    if quick:
        config = replace(config, max_seconds=config.max_seconds / 8)
    state = run(config)
    state.averaged.eval().save(out / "tokenizer")
    tokenizer = tmm.load(out / "tokenizer")

    side = config.objective.model.config["image_size"][0]
    crops = torch.stack([image_to_tensor(crop) for crop in fixed_crops("heldout", NUM_CROPS, side)])
    decoded, codes = reconstruct(tokenizer, crops)
    train_scenes, test_scenes = _balanced(NUM_PROBE_TRAIN), _balanced(NUM_PROBE_TEST, start=1 << 30)
    scene_codes = _encode_scenes(tokenizer, test_scenes, side)
    stream = codes[0].streams[0]
    summary = {
        "psnr_heldout": float(psnr(crops, decoded).mean()),
        "ssim_heldout": float(ssim(crops, decoded).mean()),
        "codebook_usage": codebook_health([*codes, *scene_codes])[stream.name]["usage"],
        "codebook_usage_crops": codebook_health(codes)[stream.name]["usage"],
        **_probe(tokenizer, train_scenes, test_scenes, side),
        "roundtrip_max_abs": _roundtrip(state.averaged.eval(), tokenizer, crops),
        "train_seconds": state.seconds,
        "train_steps": state.step,
        "ids_per_image": stream.num_ids,
        "bits_per_id": math.log2(stream.codebook_size),
        "heldout_crops": len(crops),
    }
    save_picture(comparison_grid(crops[:32], decoded[:32], zoom=2), out / "reconstructions.png")
    _curves(out / "training" / "log.jsonl", out / "curves.png")
    write_json(out / "summary.json", summary)
    if find_spec("transformers") is None:
        print("The language model needs transformers: pip install 'tokenizers_mm[llm]'", file=sys.stderr)
        return summary
    from .judgement import bridge_demo  # an optional package

    summary |= bridge_demo(tokenizer, out, BRIDGE_SECONDS / 8 if quick else BRIDGE_SECONDS)
    write_json(out / "summary.json", summary)
    return summary


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


def main(arguments: list[str]) -> int:
    """Run, then print one table and where to look."""
    parser = argparse.ArgumentParser(prog="tokenizers-mm demo")
    parser.add_argument("--out", type=Path, default=Path("runs/demo"))
    parser.add_argument("--quick", action="store_true")
    options = parser.parse_args(arguments)
    summary = demo(options.out, options.quick)
    print()
    for name, value in summary.items():
        print(f"{name:<22} {value:.4g}" if isinstance(value, float) else f"{name:<22} {value}")
    print(f"\nLook at {options.out / 'reconstructions.png'}: originals over reconstructions, never trained on,")
    print(f"and at {options.out / 'curves.png'}: the training.")
    print(f"The tokenizer is in {options.out / 'tokenizer'}: tokenizers_mm.load takes it.")
    if "generation_accuracy" in summary:
        print(f"What the language model sees: {options.out / 'understanding.md'}; what it draws from captions it never")
        print(f"read: {options.out / 'generation.png'}. It is in {options.out / 'language_model'}.")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
