"""Complete configurations from a few words: `tokenizers-mm train --preset NAME --images FOLDER --size N --codebook K`.

A preset is a shipped configuration whose grids, scales, decoder sizes and data follow from the size of the images.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from tokenizers_mm._check import fail, printable, require
from tokenizers_mm.config import parse_yaml, read_yaml, to_mapping

from .config import parse_config

CONFIGS = Path(__file__).resolve().parents[1] / "configs"
"""Beside the training program, in a checkout as in an installed package."""


@dataclass(frozen=True)
class Preset:
    """A shipped configuration that is fitted.

    file: name of the configuration. size: side of the images in pixels by default. factor: pixels per cell of the
    finest grid and side; sizes are multiples of it. fit: changes the plain mapping for a size and a number of codes
    (None keeps that of the file). says: for the top of the written file.
    """

    file: str
    size: int
    factor: int
    fit: Callable[[dict[str, Any], int, int | None], None]
    says: str


def scales(cells: int) -> list[list[int]]:
    """Square grids from 1x1 to cells x cells: all even sides up to 16 cells, else nine sides at equal distances."""
    coarse = {1, *(round(cells * part / 8) for part in range(1, 9))}
    sides = {1, cells, *range(2, cells, 2)} if cells <= 16 else coarse
    return [[side, side] for side in sorted(sides)]


def fit_any_size(data: dict[str, Any], size: int, codebook: int | None) -> None:
    """A tokenizer of any size: only the data say the size. The codes are those of the pixels."""
    data["objective"]["data"]["image_size"] = [size, size]
    config = data["objective"]["model"]["config"]
    if codebook is not None:
        config["quantizer" if "quantizer" in config else "pixel_quantizer"]["codebook_size"] = codebook


def fit_tokenflow(data: dict[str, Any], size: int, codebook: int | None) -> None:
    """Scales up to the grid of the tower, whose positions timm resizes."""
    objective = data["objective"]
    config, cells = objective["model"]["config"], size // PRESETS["tokenflow"].factor
    config["image_size"] = [size, size]
    config["scales"] = scales(cells)
    config["semantic_decoder"]["grid"] = [cells, cells]
    for tower in (config["semantic_encoder"], objective["loss"]["teacher"]):
        tower["options"]["img_size"] = size
    if codebook is not None:
        config["quantizer"]["codebook_size"] = codebook


def fit_mar(data: dict[str, Any], size: int, codebook: int | None) -> None:
    """The grid of the latents; the autoencoder is trained first, since no weights of one are in the package."""
    require(codebook is None, "--codebook", "none with this preset, whose latents are continuous", codebook)
    objective, cells = data["objective"], size // PRESETS["mar"].factor
    objective["data"]["image_size"] = [size, size]
    for part in ("encoder", "decoder"):
        objective["model"][part]["grid"] = [cells, cells]
    objective["autoencoder"] |= {"kl16": "", "steps": 50_000}


PRESETS = {
    "small": Preset("vqgan_small", 128, 8, fit_any_size, "A small convolutional tokenizer with a codebook, for a CPU."),
    "base": Preset("vqgan_base", 256, 16, fit_any_size, "A VQGAN of usual size for one GPU."),
    "tokenflow": Preset(
        "tokenflow_clipb_224", 224, 16, fit_tokenflow,
        "TokenFlow with CLIP ViT-B/16: timm downloads its weights; VGG16 must be in torch.hub's cache.",
    ),
    "dualvitok": Preset(
        "dualvitok_fix256", 256, 32, fit_any_size,
        "DualViTok; give objective.model.start_from a converted tokenizer for the weights of its tower.",
    ),
    "mar": Preset("mar_b", 256, 16, fit_mar, "MAR-B; its autoencoder is trained first (objective.autoencoder)."),
}  # fmt: skip
"""Presets by name."""


def make_preset(
    name: str,
    overrides: list[str],
    command: str = "",
    images: str | None = None,
    size: int | None = None,
    codebook: int | None = None,
) -> str:
    """The complete configuration of a preset as YAML, with a comment that says where it comes from.

    overrides: key=value, applied last. images: folder of the images; None takes the photographs of the package.

    Raises: ValueError for a size that the preset's grids do not divide, and for whatever a configuration refuses.
    """
    preset = PRESETS[name]
    size = preset.size if size is None else size
    whole = size >= preset.factor and size % preset.factor == 0
    require(whole, "--size", f"a multiple of {preset.factor} pixels for preset {name}", size)
    require(codebook is None or codebook >= 2, "--codebook", "at least 2 codes", codebook)
    if images is not None and not Path(images).is_dir():
        fail("--images", "a folder", images)
    path = CONFIGS / f"{preset.file}.yaml"
    data = read_yaml(path)
    data["out"] = f"runs/{name}_{size}"
    preset.fit(data, size, codebook)
    source = {"kind": "photographs"} if images is None else {"kind": "folder", "path": str(images)}
    data["objective"]["data"]["sources"] = [source]
    config = parse_config(parse_yaml(yaml.safe_dump(data), overrides, f"preset {name}"))
    lines = [preset.says, f"Made by: {printable(command)}" if command else "", f"After configs/{preset.file}.yaml."]
    header = "".join(f"# {line}\n" for line in lines if line)
    return header + yaml.safe_dump(to_mapping(config), sort_keys=False, width=120, allow_unicode=True)
