"""All kinds of quantizers at equal bits: one encoder, decoder, data set and number of steps for each.

    python -m benchmarks.quantizers [--steps 300] [--only vq lfq ...] [--crops 2048] [--record]

Images are 64 x 64 crops of photographs, on a grid of 8 x 8 vectors of 10 bits (640 bits an image; the multi-scale
kinds have 85 ids of 7.5 bits, 637 bits; "per_dimension" has 576). Held-out crops are of other photographs. Columns:

    PSNR         decibels on held-out crops
    usage        share of the codes that occur in them, mean over the ids of a vector
    perplexity   of their frequencies, over the number of codes
    search       microseconds per vector for ids and vectors, in evaluation, one thread
    step         milliseconds of a training step, all of it (the processor's time)

Codes that no vector of 50 steps used are moved to vectors of the last batch, where the kind can do so. "per_dimension"
is not trained: the autoencoder learns half of the steps without a quantizer, then only the decoder, for quantized
features. "none" is the same network without a quantizer.
"""

import json
import math
import random
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks import harness
from tokenizers_mm._images import image_to_tensor
from tokenizers_mm.data.photographs import fixed_crops, photographs
from tokenizers_mm.eval.image import psnr
from tokenizers_mm.functional.usage import count_ids, perplexity, usage
from tokenizers_mm.quantizers import (
    BSQConfig,
    FSQConfig,
    FVQConfig,
    IBQConfig,
    LFQConfig,
    MultiCodebookConfig,
    MultiScaleQuantizer,
    PerDimensionConfig,
    Quantizer,
    ResidualConfig,
    ScalesConfig,
    SharedIndexConfig,
    SimVQConfig,
    SmoothingConfig,
    VQConfig,
    build_quantizer,
)
from tokenizers_mm.types import Quantized

SIDE, GRID, WIDTH, BATCH, DIM, CODES = 64, 8, 48, 16, 8, 1024
NOTES = """
300 steps are few, and kinds differ in what they need of them; one seed each, so a difference of half a decibel says
little. More than 1 dB behind the best, with what was tested (all else equal, 300 steps):

- ibq: code norms. With temperature 1 it stays at 16.18 dB and 1 % usage: codes grow to the norm of the features (4.9)
  and the longest win the inner product. Codes rescaled to one norm after every step: 21.71 dB, usage 90 %. Temperature
  0.1 keeps the norms near 1.4: 22.12 dB (without the entropy term 17.11 dB, with 4 times of it 21.74 dB). A smaller
  learning rate (0.001) is no remedy: 13.81 dB. On unit vectors ("ibq, unit") nothing of this is left.
- lfq, bsq: one bit per channel. Neither weights nor learning rates matter: lfq 21.67 dB without both terms, 21.39 to
  21.49 dB with smaller weights, 21.64 dB with a rate of 0.004; in 2 groups 21.67 dB without terms; bsq 21.37 dB without
  entropy, 21.48 dB with a rate of 0.004. Larger weights do harm: lfq 19.55 dB with 0.1 for the entropy and 0.25 for the
  commitment. The same 10 bits as levels of fsq: 10 channels of 2: 17.98 dB, 5 of 4: 22.54 dB, 8 x 8 x 4 x 4: 22.92 dB,
  2 of 32: 19.37 dB. So at this budget 10 channels of 1 bit are a poor split; lfq makes more of it than fsq does.

No longer behind, after the cause was found: vq, unit (18.79 dB with the rate of 0.002, with or without revival;
23.24 dB with 0.001; 22.12 dB with 0.0005), fsq, sigmoid (20.59 dB with 0.001, 22.68 dB with 0.002, 22.95 dB with
0.004), and per_dimension (21.83 dB as 5 channels of 2 bits, 22.05 dB with levels for a narrower range, 20.83 dB as 10
of 1, 20.15 dB as 2 of 5; 3 of 3 have 576 bits and 23.07 dB; twice the steps for its encoder change nothing: 21.88 dB).

The rows were not tuned alike. After first results "ibq", "ibq, unit" (temperature 0.1 in place of the published 1.0
and 2.0), "vq, unit", both "lfq", the three "fsq" (without projections; "sigmoid" with a rate of its own) and
"per_dimension" were changed and run again, judged by the same held-out crops; all others ran once. So the order of
kinds is no evidence that one is better than another. "search" and "step" of "ibq" are of a machine with other work
(3.54 and 49 without it); the others ran with less or none.
"""

SCALES = [(1, 1), (2, 2), (4, 4), (8, 8)]
SCALE_CODES = 181
REVIVE_EVERY, REVIVE_UNTIL = 50, 0.8
PLAIN = {"codebook": 1.0, "commitment": 0.25}
BITS = {"commitment": 0.05, "entropy": 0.01}


@dataclass(frozen=True)
class Kind:
    """A configuration, the weights of its terms, and how it is used and trained."""

    config: Any
    weights: Mapping[str, float] = field(default_factory=dict)
    scales: ScalesConfig | None = None
    lr: float = 2e-3

    def build(self) -> Quantizer:
        quantizer = build_quantizer(self.config)
        return quantizer if self.scales is None else MultiScaleQuantizer(quantizer, SCALES, self.scales)


def kinds() -> dict[str, Kind]:
    """Every kind with its usual weights, 10 bits a vector."""
    vq = VQConfig(SCALE_CODES, DIM)
    return {
        "vq": Kind(VQConfig(CODES, DIM), PLAIN),
        "vq, unit": Kind(VQConfig(CODES, DIM, "unit"), PLAIN, lr=1e-3),
        "vq, rotation": Kind(VQConfig(CODES, DIM, rotation=True), PLAIN),
        "simvq": Kind(SimVQConfig(CODES, DIM), PLAIN),
        "fvq": Kind(FVQConfig(CODES, DIM, group=16, width=64), PLAIN),
        "ibq": Kind(
            IBQConfig(CODES, DIM, 0.1, entropy_temperature=0.01),
            {"assignment": 0.1, "commitment": 0.1, "codebook": 0.25, "entropy": 0.005},
        ),
        "ibq, unit": Kind(
            IBQConfig(CODES, DIM, 0.1, normalize=True), {"assignment": 0.1, "commitment": 0.1, "codebook": 0.25}
        ),
        "shared_index": Kind(SharedIndexConfig(CODES, (4, 4)), PLAIN),
        "lfq": Kind(LFQConfig(10), BITS),
        "lfq, 2 groups": Kind(LFQConfig(10, groups=2), BITS),
        "bsq": Kind(BSQConfig(10), {"commitment": 0.0, "entropy": 0.1}),
        "fsq": Kind(FSQConfig((8, 8, 4, 4), 4, project=False)),
        "fsq, symmetric": Kind(FSQConfig((8, 8, 4, 4), 4, "symmetric", project=False)),
        "fsq, sigmoid": Kind(FSQConfig((8, 8, 4, 4), 4, "sigmoid", project=False), lr=4e-3),
        "residual": Kind(ResidualConfig(VQConfig(32, DIM), 2), PLAIN),
        "multi_codebook": Kind(MultiCodebookConfig(VQConfig(32, DIM // 2), 2), PLAIN),
        "scales, vq": Kind(vq, PLAIN, ScalesConfig()),
        "scales, VAR": Kind(vq, PLAIN, ScalesConfig(smoothing=SmoothingConfig(), learning="by_sum")),
        "per_dimension": Kind(PerDimensionConfig(3, 3, -3.0, 3.0)),
        "none": Kind(None),
    }


class Residual(nn.Module):
    """x + two 3 x 3 convolutions."""

    def __init__(self) -> None:
        super().__init__()
        self.block = nn.Sequential(
            nn.GroupNorm(8, WIDTH), nn.SiLU(), nn.Conv2d(WIDTH, WIDTH, 3, padding=1),
            nn.GroupNorm(8, WIDTH), nn.SiLU(), nn.Conv2d(WIDTH, WIDTH, 3, padding=1),
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        return x + self.block(x)


class AutoEncoder(nn.Module):
    """Images [B, 3, 64, 64] to features [B, 8, 8, dim] and back."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.encoder = nn.Sequential(
            nn.Conv2d(3, 32, 4, 4), nn.SiLU(), nn.Conv2d(32, WIDTH, 2, 2), Residual(),
            nn.GroupNorm(8, WIDTH), nn.SiLU(), nn.Conv2d(WIDTH, dim, 1),
        )  # fmt: skip
        self.decoder = nn.Sequential(
            nn.Conv2d(dim, WIDTH, 1), Residual(), nn.ConvTranspose2d(WIDTH, 32, 2, 2), nn.SiLU(),
            nn.ConvTranspose2d(32, 3, 4, 4),
        )  # fmt: skip

    def encode(self, x: Tensor) -> Tensor:
        return self.encoder(x).permute(0, 2, 3, 1)

    def decode(self, vectors: Tensor) -> Tensor:
        return self.decoder(vectors.permute(0, 3, 1, 2))


def training_crops(count: int) -> Tensor:
    """Random crops [count, 3, 64, 64] in [-1, 1] of the training photographs, the same for all kinds."""
    rng, pictures = random.Random(1), list(photographs("train").values())
    crops = []
    for index in range(count):
        picture = pictures[index % len(pictures)]
        side = rng.choice([64, 96, 128])
        left, top = rng.randint(0, picture.width - side), rng.randint(0, picture.height - side)
        crops.append(image_to_tensor(picture.crop((left, top, left + side, top + side)).resize((SIDE, SIDE))))
    return torch.stack(crops)


def batches(images: Tensor, steps: int) -> Iterator[Tensor]:
    generator = torch.Generator().manual_seed(2)
    for _ in range(steps):
        yield images[torch.randint(0, len(images), (BATCH,), generator=generator)]


def train(kind: Kind, images: Tensor, steps: int) -> tuple[AutoEncoder, Quantizer | None, float]:
    """A trained autoencoder with its quantizer, and seconds of processor time per step."""
    torch.manual_seed(0)
    frozen = isinstance(kind.config, PerDimensionConfig)
    quantizer = None if kind.config is None else kind.build().train()
    model = AutoEncoder(DIM if quantizer is None else quantizer.dim)
    parameters = [*model.parameters(), *([] if quantizer is None else quantizer.parameters())]
    optimizer = torch.optim.AdamW(parameters, lr=kind.lr, betas=(0.9, 0.95), weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, kind.lr, total_steps=steps, pct_start=0.05)
    used = None if quantizer is None else torch.zeros(quantizer.codebook_size * quantizer.groups, dtype=torch.int64)
    start = time.process_time()
    for step, x in enumerate(batches(images, steps)):
        z = model.encode(x)
        if frozen and step >= steps // 2:
            z = z.detach()
        warm = quantizer is None or (frozen and step < steps // 2)
        found = Quantized(z, torch.zeros(0)) if warm else quantizer.quantize(z)  # type: ignore[union-attr]
        loss = F.mse_loss(model.decode(found.vectors), x)
        for name, term in (found.terms or {}).items():
            loss = loss + kind.weights[name] * term
        if frozen and warm:
            loss = loss + 1e-3 * z.square().mean()  # keeps features inside the range of the levels
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if quantizer is not None and quantizer.revivable and used is not None and found.queries is not None:
            ids = found.ids.reshape(-1, quantizer.groups) + torch.arange(quantizer.groups) * quantizer.codebook_size
            used += count_ids(ids, len(used))
            if (step + 1) % REVIVE_EVERY == 0 and step < REVIVE_UNTIL * steps:
                unused, queries = (used == 0).nonzero()[:, 0], found.queries.flatten(0, -2)
                unused = unused[torch.randperm(len(unused))[: len(queries)]]
                quantizer.set_codes(unused, queries[torch.randperm(len(queries))[: len(unused)]])
                used.zero_()
    return model.eval(), None if quantizer is None else quantizer.eval(), (time.process_time() - start) / steps


@torch.no_grad()
def measure(model: AutoEncoder, quantizer: Quantizer | None, images: Tensor) -> dict[str, float]:
    z = model.encode(images)
    if quantizer is None:
        return {"psnr": float(psnr(model.decode(z), images).mean())}
    start = time.process_time()
    found = quantizer.quantize(z)
    seconds = time.process_time() - start
    ids = found.ids.reshape(-1, quantizer.groups)
    counts = [count_ids(part, quantizer.codebook_size) for part in ids.unbind(-1)]
    positions = len(images) * GRID * GRID
    return {
        "psnr": float(psnr(model.decode(found.vectors), images).mean()),
        "usage": sum(map(usage, counts)) / len(counts),
        "perplexity": sum(perplexity(each) / quantizer.codebook_size for each in counts) / len(counts),
        "bits": ids.numel() / len(images) * math.log2(quantizer.codebook_size),
        "search": 1e6 * seconds / positions,
    }


HEAD = ["kind", "bits", "PSNR", "usage", "perplexity", "search", "step"]
FORMS = {
    "bits": "{:.0f}",
    "psnr": "{:.2f} dB",
    "usage": "{:.0%}",
    "perplexity": "{:.0%}",
    "search": "{:.2f}",
    "step": "{:.0f}",
}


def cells(row: Mapping[str, Any]) -> list[str]:
    return [row["kind"], *(form.format(row[name]) if name in row else "" for name, form in FORMS.items())]


def plot(rows: list[dict[str, Any]], path: str) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    shown = sorted((row for row in rows if "usage" in row), key=lambda row: row["psnr"])
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(9, 4.5), sharey=True)
    left.barh([row["kind"] for row in shown], [row["psnr"] for row in shown], color="tab:blue")
    left.set_xlim(min(row["psnr"] for row in shown) - 1)
    left.set_xlabel("PSNR in dB, held-out crops")
    right.barh([row["kind"] for row in shown], [row["usage"] for row in shown], color="tab:grey", label="usage")
    right.barh(
        [row["kind"] for row in shown],
        [row["perplexity"] for row in shown],
        0.4,
        color="tab:orange",
        label="perplexity",
    )
    right.set_xlabel("share of the codes")
    right.legend()
    figure.suptitle(f"640 bits per 64 x 64 image, {shown[0]['steps']} steps")
    figure.tight_layout()
    figure.savefig(path, dpi=140)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = harness.parser(__doc__)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--only", nargs="+", choices=sorted(kinds()), help="these kinds alone")
    parser.add_argument("--crops", type=int, default=2048, help="for training")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    images = training_crops(options.crops)
    held_out = torch.stack([image_to_tensor(crop) for crop in fixed_crops("heldout", 192, SIDE)])
    rows: list[dict[str, Any]] = []
    for name in options.only or kinds():
        model, quantizer, seconds = train(kinds()[name], images, options.steps)
        facts = measure(model, quantizer, held_out)
        rows.append({"kind": name, "steps": options.steps, **facts, "step": 1e3 * seconds})
        print("  ".join(cells(rows[-1])), flush=True)
    print("\n" + harness.table([HEAD, *map(cells, rows)]))
    if options.record:
        keep(rows, options.steps)


def keep(rows: list[dict[str, Any]], steps: int) -> None:
    """Put the rows into benchmarks/results, with those of other kinds that had as many steps."""
    harness.RESULTS.mkdir(exist_ok=True)
    path = harness.RESULTS / "quantizers.json"
    known = json.loads(path.read_text())["rows"] if path.is_file() else []
    by_kind = {row["kind"]: row for row in [*known, *rows] if row["steps"] == steps}
    kept = [by_kind[name] for name in kinds() if name in by_kind]
    path.write_text(json.dumps({"about": harness.machine(), "rows": kept}, indent=1) + "\n")
    lines = [HEAD, ["---"] * len(HEAD), *map(cells, kept)]
    text = "".join(f"| {' | '.join(line)} |\n" for line in lines)
    (harness.RESULTS / "quantizers.md").write_text(text + NOTES)
    plot(kept, str(harness.RESULTS / "quantizers.png"))


if __name__ == "__main__":
    main()
