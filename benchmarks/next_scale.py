"""NextFlow's two options for next-scale prediction, each with its effect at the demo's size.

    python -m benchmarks.next_scale [--ways plain "residual features"] [--steps 400] [--scenes 1500] [--held-out 64]
                                    [--record]

The demo's language model learns to draw scenes from captions, with the tokenizer that comes with the package, in four
ways that differ in nothing else. Printed for each: nats per id of held-out scenes, as a mean over ids and as a mean
over scales, and the share of drawings whose largest object has the colour asked for.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from benchmarks import harness
from tokenizers_mm import load
from tokenizers_mm._images import tensor_to_images
from tokenizers_mm.data.scenes import Scene, make_scene, scene_images
from tokenizers_mm.eval.scenes import judge_scene
from tokenizers_mm.llm.next_scale import NextScaleGenerator, ScaleSampling, next_scale_loss, scale_bounds
from tokenizers_mm.models.tokenflow import TokenFlow
from tokenizers_mm.types import ImageCodes
from train.demo.language_model import Bridge, make_processor
from train.optim import OptimizerConfig, descend, learning_rate

BATCH, NEAR = 8, 10
OPTIONS = OptimizerConfig(lr=2e-3, betas=(0.9, 0.98), weight_decay=0.01, schedule="cosine", warmup=40, clip=1.0)


@dataclass(frozen=True)
class Way:
    """scale_power: of `scale_weights`. mistakes: share of ids read wrongly (self-correction). residual: features."""

    scale_power: float = 0.0
    mistakes: float = 0.0
    residual: bool = False


WAYS = {
    "plain": Way(),
    "scale reweighting": Way(scale_power=0.9),
    "residual features": Way(residual=True),
    "self-correction, residual features": Way(mistakes=0.3, residual=True),
}


class Drawing:
    """The demo's language model in one way, and scenes with the ids that it reads and learns."""

    def __init__(self, tokenizer: TokenFlow, way: Way, scenes: Sequence[Scene]) -> None:
        torch.manual_seed(0)
        self.way, self.tokenizer, self.scenes = way, tokenizer, scenes
        self.bridge = Bridge(tokenizer, make_processor(tokenizer))
        self.bridge.scales.residual = way.residual
        self.read, self.learned = self.ids(scenes, way.mistakes)

    @torch.no_grad()
    def ids(self, scenes: Sequence[Scene], mistakes: float) -> tuple[Tensor, Tensor]:
        """Ids of scenes, int64 [N, L]: those that are read, of which some are near codes instead, and those learned."""
        generator, parts = torch.Generator().manual_seed(0), []
        near = torch.cdist(self.bridge.codes, self.bridge.codes).topk(NEAR + 1, largest=False).indices[:, 1:]
        for start in range(0, len(scenes), 64):
            z = self.tokenizer.encode_features(scene_images(list(scenes[start : start + 64]), self.bridge.size[0]))
            read: list[Tensor] = []

            def corrupt(ids: Tensor, scale: int, read: list[Tensor] = read) -> Tensor:
                other = near[ids, torch.randint(NEAR, ids.shape, generator=generator)]
                read.append(torch.where(torch.rand(ids.shape, generator=generator) < mistakes, other, ids))
                return read[-1]

            learned, _ = self.tokenizer.quantizer.self_correcting(z, corrupt)
            parts.append((torch.cat([part.flatten(1) for part in read], 1), learned))
        reads, learns = zip(*parts, strict=True)
        return torch.cat(reads), torch.cat(learns)

    def train(self, steps: int) -> None:
        """Draw scenes from captions, some without one."""
        rng, bridge = random.Random(0), self.bridge.train()
        optimizer = torch.optim.AdamW(bridge.parameters(), OPTIONS.lr, OPTIONS.betas, weight_decay=0.01)
        for step in range(steps):
            chosen = [rng.randrange(len(self.scenes)) for _ in range(BATCH)]
            captions = ["" if rng.random() < 0.1 else self.scenes[index].caption for index in chosen]
            given = (bridge.codes[self.read[chosen]], bridge.first_id, self.way.scale_power)
            loss = next_scale_loss(bridge.model, bridge.scales, bridge.prompts(captions), self.learned[chosen], *given)
            loss.backward()
            descend(optimizer, learning_rate(OPTIONS, step, step / steps), OPTIONS.clip)

    @torch.no_grad()
    def measure(self, count: int) -> dict[str, Any]:
        """Nats per id, from right ids, and right colours of drawings, on so many held-out scenes."""
        bridge, tokenizer = self.bridge.eval(), self.tokenizer
        scenes = [make_scene(index, "heldout") for index in range(count)]
        ids, _ = self.ids(scenes, 0.0)
        captions = [scene.caption for scene in scenes]
        prompts = bridge.prompts(captions)
        kept = [
            next_scale_loss(bridge.model, bridge.scales, prompts, ids, bridge.codes[ids], bridge.first_id, power)
            for power in (0.0, 1.0)
        ]
        drawer = NextScaleGenerator(
            bridge.model, bridge.scales, bridge.codes.__getitem__, bridge.first_id, len(bridge.codes)
        )
        sampling = ScaleSampling(((100, 0.9),), 3.0)
        drawn = drawer(prompts, bridge.prompts([""] * count), sampling, torch.Generator().manual_seed(0))
        images = tokenizer.decode(ImageCodes(drawn, *bridge.size, tokenizer.streams(*bridge.size)))
        judged = [judge_scene(image) for image in tensor_to_images(images)]
        right = [found is not None and found[1] == s.objects[0].colour for found, s in zip(judged, scenes, strict=True)]
        return {
            "nats_per_id": float(kept[0]),
            "nats_per_id_mean_of_scales": float(kept[1]),
            "right_colours": sum(right) / count,
        }


def main(arguments: Sequence[str] | None = None) -> None:
    parser = harness.parser(__doc__)
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS))
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--scenes", type=int, default=1500)
    parser.add_argument("--held-out", type=int, default=64)
    options = parser.parse_args(arguments)
    tokenizer = load("tokenizers_mm/demo-64")
    assert isinstance(tokenizer, TokenFlow)
    scenes = [make_scene(index) for index in range(options.scenes)]
    print("ids by scale:", [b - a for a, b in scale_bounds(tokenizer.quantizer.grids)])
    rows = {}
    for name in options.ways:
        drawing = Drawing(tokenizer, WAYS[name], scenes)
        drawing.train(options.steps)
        rows[name] = drawing.measure(options.held_out)
        print(name, rows[name], flush=True)
    if options.record:
        harness.record("next_scale", {"steps": options.steps, "ways": rows}, harness.machine())


if __name__ == "__main__":
    main()
