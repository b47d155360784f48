"""Do stable ids differ between batches, threads, instruction sets, dtypes and compiled parts? What do they cost?

    python -m benchmarks.stable_ids [COUNT]

Every tokenizer of tests/stable_cases.py encodes COUNT images (the tiny ones too) in every variant, each kind of machine
in a process of its own, and the ids are compared with those of a float64 pass. Prints a line per variant: ids compared,
ids that differ, images decided again, the largest error as a share of the bound; and for a stream of images the CPU
time on top of float32, and how many ids differ without `stable`.
"""

import json
import os
import subprocess
import sys
import time
from typing import Any

import torch

from tests.stable_cases import TOKENIZERS, as_pil, images
from tokenizers_mm.models import stable

MACHINES: dict[str, dict[str, str]] = {
    "this": {},
    "avx2": {"ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2", "TOKENIZERS_MM_ISA": "avx2"},
    "no avx": {"ATEN_CPU_CAPABILITY": "default", "ONEDNN_MAX_CPU_ISA": "SSE41", "TOKENIZERS_MM_ISA": "portable"},
}
VARIANTS = (
    "batch 1",
    "batch 2",
    "batch 7",
    "batch 32",
    "batch 16, stream",
    "batch 32, 2 threads",
    "batch 7, bfloat16 images",
)


def encode(tokenizer: Any, x: torch.Tensor, variant: str, how: bool) -> torch.Tensor:
    torch.set_num_threads(2 if "threads" in variant else 1)
    size = int(variant.split()[1].rstrip(","))
    x = x.bfloat16() if "bfloat16" in variant else x
    if "stream" not in variant:
        return torch.cat([tokenizer.encode(part, stable=how).ids for part in x.split(size)])
    found: dict[int, torch.Tensor] = {}
    for numbers, codes in tokenizer.encode_batches(as_pil(x), stable=how, batch_size=size):
        found.update(zip(numbers, codes.ids, strict=True))
    return torch.stack([found[number] for number in range(len(x))])


def machine(count: int, name: str) -> None:
    """All variants on one kind of machine; the float64 ids are made where nothing is limited."""
    for family, build in TOKENIZERS.items():
        tokenizer = build()
        x = images(tokenizer, count)
        path = f"/tmp/stable_{family}_{count}.pt"
        if name == "this":
            wide = stable._converted(tokenizer, torch.float64)
            with torch.no_grad():
                torch.save(torch.cat([wide.encode_tensor(part.double()).ids for part in x.split(16)]), path)
        exact = torch.load(path)
        variants = [*VARIANTS] if name == "this" else ["batch 1", "batch 32"]
        if name == "this" and os.environ.get("COMPILE") and family in ("demo-64", "dualvitok"):
            variants.append("batch 8, compiled")
        tokenizer.encode(x[:64], stable=True)
        for variant in variants:
            if "compiled" in variant:
                for part in (tokenizer.pixel_encoder, tokenizer.semantic_encoder):
                    part.compile()  # type: ignore[operator]
            before, start = tokenizer.stability, time.process_time()
            ids = encode(tokenizer, x, variant, True)
            middle = time.process_time()
            after = tokenizer.stability
            line = {
                "machine": name,
                "tokenizer": family,
                "variant": variant,
                "ids": ids.numel(),
                "differ": int((ids != exact).sum()),
                "again": f"{after.again - before.again} of {count}",
                "largest": round(after.largest, 3),
            }
            if "stream" in variant:
                plain = encode(tokenizer, x, variant, False)
                cost = 100 * (middle - start) / (time.process_time() - middle) - 100
                line |= {"differ without stable": int((plain != exact).sum()), "cost": f"{cost:.0f} %"}
            print(json.dumps(line), flush=True)


def main() -> None:
    """Run every kind of machine in a process of its own."""
    count = int(sys.argv[1]) if len(sys.argv) > 1 else 512
    if len(sys.argv) > 2:
        machine(count, sys.argv[2])
        return
    for name, environment in MACHINES.items():
        command = [sys.executable, "-m", "benchmarks.stable_ids", str(count), name]
        subprocess.run(command, env={**os.environ, **environment}, check=True)


if __name__ == "__main__":
    main()
