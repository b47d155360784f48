"""One training step against the original TokenFlow recipe's, re-created here: processor time and peak memory.

`python -m benchmarks.train_step [--channels 32] [--batch 2] [--steps 3]`: the same model (scales, codebook and grids of
TokenFlow-clipb at 224, with narrower networks unless `--channels 128`), batch and precision; each in a process of its
own. Re-created of the original: its quantizer (three matrices of all distances per scale, one-hot rows, the entropy
term at weight 0, a window of used ids) and its optimizer (Adam, tensors one by one). LPIPS, teacher and discriminator
are the same in both, and left out.
"""

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from torch import Tensor

from benchmarks import harness
from tokenizers_mm.data.sources import Batch
from tokenizers_mm.quantizers.shared_index import SharedIndexQuantizer
from tokenizers_mm.types import Quantized
from train.config import parse_config
from train.state import build_state
from train.step import train_step

WINDOW = 131072


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


def build(original: bool, channels: int, batch: int) -> Any:
    """The state of a run of one of the two, its batch set."""
    whole = channels == 128
    pixels = {"channels": channels, "multipliers": [1, 1, 2, 2, 4], "num_blocks": 2, "attention_levels": [4]}
    name, width, heads = ("vit_base_patch16_224", 768, 12) if whole else ("vit_tiny_patch16_224", 192, 3)
    model = {
        "image_size": [224, 224],
        "scales": [[side, side] for side in (1, 2, 4, 6, 8, 10, 12, 14)],
        "quantizer": {"codebook_size": 32768, "dims": [32, 8]},
        "semantic_encoder": {"name": name, "options": {"img_size": 224}},
        "pixel_encoder": {"out_channels": 256, **pixels},
        "semantic_decoder": {"grid": [14, 14], "out_dim": 512, "width": width, "depth": 3, "heads": heads},
        "pixel_decoder": {"in_channels": 256, **pixels},
    }
    data = {
        "out": "",
        "steps": 1000,
        "batch_size": batch,
        "objective": {
            "kind": "reconstruction",
            "model": {"family": "tokenflow", "config": model},
            "loss": {"weights": {"pixel": 1.0, "codebook": 1.0, "commitment": 0.25}},
            "optimizer": {"lr": 1e-4, "betas": [0.9, 0.95]},
        },
    }
    state = build_state(parse_config(data), Accelerator(cpu=True))
    if original:
        tokenizer: Any = state.objective.networks["tokenizer"]
        tokenizer.quantizer.quantizer.__class__ = OriginalQuantizer
        options = state.learners["tokenizer"].options
        parameters: Any = state.learners["tokenizer"].parameters
        state.optimizers["tokenizer"] = torch.optim.Adam(parameters, options.lr, options.betas, foreach=False)
    return state


def measure(original: bool, channels: int, batch: int, steps: int) -> dict[str, float]:
    """Median processor seconds of a step, and the peak of resident memory in MB."""
    torch.set_num_threads(1)
    state = build(original, channels, batch)
    generator = torch.Generator().manual_seed(0)
    times = []
    for step in range(steps + 1):
        images = torch.rand(batch, 3, 224, 224, generator=generator) * 2 - 1
        started = time.process_time()
        train_step(state, [Batch(images, [""] * batch, [])])
        times.append(time.process_time() - started)
        assert state.step == step + 1
    peak = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return {"seconds": sorted(times[1:])[len(times[1:]) // 2], "peak_mb": int(peak.split()[1]) / 1e3}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--channels", type=int, default=32)
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--one", choices=["original", "ours"])
    options = parser.parse_args()
    if options.one:
        print(json.dumps(measure(options.one == "original", options.channels, options.batch, options.steps)))
        return
    found = {}
    for name in ("original", "ours"):
        sizes = [f"--{key}={getattr(options, key)}" for key in ("channels", "batch", "steps")]
        command = [sys.executable, "-m", "benchmarks.train_step", "--one", name, *sizes]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        found[name] = json.loads(done.stdout.splitlines()[-1])
        print(name, found[name], flush=True)
    row = {f"{key}_ratio": found["original"][key] / found["ours"][key] for key in ("seconds", "peak_mb")}
    print(row)
    harness.record("train_step", {**vars(options), **found, **row}, harness.machine())


if __name__ == "__main__":
    main()
