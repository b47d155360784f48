"""One training step against the original TokenFlow recipe's, re-created here: time and peak memory.

    python -m benchmarks.train_step [--channels 32] [--codebook 32768] [--batch 2] [--steps 3] [--record]
    python -m benchmarks.train_step --channels 128 --batch 16 --device cuda --precision bf16 --compile inductor

The same model (scales, codebook and grids of TokenFlow-clipb at 224, with narrower networks unless `--channels 128`),
batch and precision; each in a process of its own, on one CPU thread (processor time) or on a GPU (wall time). Ours
alone is compiled: the original recipe has no such option. Re-created of the original: its quantizer (three matrices of
all distances per scale, one-hot rows, the entropy term at weight 0, a window of used ids) and its optimizer (Adam,
tensors one by one). LPIPS, teacher and discriminator are the same in both, and left out.
"""

import argparse
import json
import statistics
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks import harness
from tokenizers_mm.data.sources import Batch
from tokenizers_mm.quantizers.shared_index import SharedIndexQuantizer
from tokenizers_mm.types import Quantized
from train.config import parse_config
from train.state import build_state
from train.step import train_step

WINDOW = 131072
WARM_UP = 2
"""Steps before the timed ones: the first compile, and make the optimizer's state."""


class OriginalQuantizer(SharedIndexQuantizer):
    """The released quantizer's computation over the parameters of ours."""

    def prepared(self) -> Any:
        return self.quantize

    def quantize(self, z: Tensor) -> Quantized:
        rows = z.reshape(-1, self.dim)
        parts = [F.normalize(part, dim=-1) for part in rows.split(self.config.dims, -1)]
        tables = [F.normalize(table, dim=-1) for table in self.codebooks]
        distances = [
            part.square().sum(1, keepdim=True) + table.square().sum(1) - 2 * part @ table.T
            for part, table in zip(parts, tables, strict=True)
        ]
        total = distances[0] + 1.0 * distances[1]
        ids = total.argmin(1)
        one_hot = F.one_hot(ids, self.codebook_size)
        one_hot.to(z.dtype)
        vectors, queries = torch.cat([F.embedding(ids, table) for table in tables], 1), torch.cat(parts, 1)
        logits = -total / 0.01
        probabilities, logs = logits.softmax(-1), F.log_softmax(logits + 1e-5, dim=-1)
        mean = probabilities.mean(0)
        entropy = -(probabilities * logs).sum(-1).mean() + (mean * (mean + 1e-5).log()).sum()
        terms = {
            "codebook": (vectors - queries.detach()).square().mean() + 0.0 * entropy,
            "commitment": (vectors.detach() - queries).square().mean(),
        }
        self.used = torch.cat([getattr(self, "used", ids[:0]), ids])[-WINDOW:]
        self.used.unique()
        found = (queries + (vectors - queries).detach()).view_as(z)
        return Quantized(found, ids.view(z.shape[:-1]), terms, queries=queries.detach().view_as(z))


def build(original: bool, options: argparse.Namespace) -> Any:
    """The state of a run of one of the two."""
    channels = options.channels
    whole = channels == 128
    pixels = {"channels": channels, "multipliers": [1, 1, 2, 2, 4], "num_blocks": 2, "attention_levels": [4]}
    name, width, heads = ("vit_base_patch16_224", 768, 12) if whole else ("vit_tiny_patch16_224", 192, 3)
    model = {
        "image_size": [224, 224],
        "scales": [[side, side] for side in (1, 2, 4, 6, 8, 10, 12, 14)],
        "quantizer": {"codebook_size": options.codebook, "dims": [32, 8]},
        "semantic_encoder": {"name": name, "options": {"img_size": 224}},
        "pixel_encoder": {"out_channels": 256, **pixels},
        "semantic_decoder": {"grid": [14, 14], "out_dim": 512, "width": width, "depth": 3, "heads": heads},
        "pixel_decoder": {"in_channels": 256, **pixels},
    }
    data = {
        "out": "",
        "steps": 1000,
        "batch_size": options.batch,
        "precision": options.precision,
        "device": options.device,
        "compile": "" if original else options.compile,
        "objective": {
            "kind": "reconstruction",
            "model": {"family": "tokenflow", "config": model},
            "loss": {"weights": {"pixel": 1.0, "codebook": 1.0, "commitment": 0.25}},
            "optimizer": {"lr": 1e-4, "betas": [0.9, 0.95]},
        },
    }
    state = build_state(parse_config(data))
    if original:
        tokenizer: Any = state.objective.networks["tokenizer"]
        tokenizer.quantizer.quantizer.__class__ = OriginalQuantizer
        learner = state.learners["tokenizer"].options
        parameters: Any = state.learners["tokenizer"].parameters
        state.optimizers["tokenizer"] = torch.optim.Adam(parameters, learner.lr, learner.betas, foreach=False)
    return state


def measure(original: bool, options: argparse.Namespace) -> dict[str, float]:
    """Median seconds of a step (of the processor, or wall time on a GPU) and the peak of memory in MB.

    The peak is that of the process, on a GPU that of the tensors there.
    """
    torch.set_num_threads(1)
    state = build(original, options)
    cuda = options.device == "cuda"
    clock = harness.CLOCKS["wall" if cuda else "cpu"]
    generator = torch.Generator().manual_seed(0)
    times = []
    for step in range(options.steps + WARM_UP):
        images = torch.rand(options.batch, 3, 224, 224, generator=generator) * 2 - 1
        batch = Batch(images.to(options.device), [""] * options.batch, [])
        started = clock()
        train_step(state, [batch])
        harness.synchronize(options.device)
        times.append(clock() - started)
        assert state.step == step + 1
    peak = torch.cuda.max_memory_allocated() / 1e6 if cuda else harness.status_megabytes("VmHWM")
    return {"seconds": statistics.median(times[WARM_UP:]), "peak_mb": peak}


def main(arguments: Sequence[str] | None = None) -> None:
    parser = harness.parser(__doc__)
    parser.add_argument("--channels", type=int, default=32)
    parser.add_argument("--codebook", type=int, default=32768)
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--precision", default="fp32", choices=["fp32", "bf16"])
    parser.add_argument("--compile", default="", choices=["", "inductor"])
    parser.add_argument("--one", choices=["original", "ours"], help="measure this one alone, in this process")
    options = parser.parse_args(arguments)
    if options.one:
        print(json.dumps(measure(options.one == "original", options)))
        return
    found, sizes = {}, {key: value for key, value in vars(options).items() if key not in ("one", "record")}
    for name in ("original", "ours"):
        print(name, end=" ", flush=True)
        given = [f"--{key}={value}" for key, value in sizes.items()]
        found[name] = json.loads(harness.run_alone("benchmarks.train_step", ["--one", name, *given])[-1])
    row = {f"{key}_ratio": found["original"][key] / found["ours"][key] for key in ("seconds", "peak_mb")}
    print(row)
    if options.record:
        harness.record("train_step", {**sizes, **found, **row}, harness.machine(options.device))


if __name__ == "__main__":
    main()
