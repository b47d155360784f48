"""Do stable ids differ between batches, threads, instruction sets, dtypes and compiled parts? What do they cost?

    python -m benchmarks.stable_ids [--count 512] [--tokenizers NAME ...] [--variants NAME ...] [--rounds 3] [--full]
    ATEN_CPU_CAPABILITY=default ONEDNN_MAX_CPU_ISA=SSE41 TOKENIZERS_MM_ISA=portable \
        python -m benchmarks.stable_ids --count 12 --ids OUT

Every tokenizer encodes N images in every variant, each kind of machine in a process of its own, and the ids are
compared with those of a float64 pass (at full size with those of the first variant, which decides the images of its
calibration in float64). Prints a line per variant: ids compared, ids that differ, images decided again,
the largest error as a share of the bound. Then the cost: CPU time of a stream of images on top of float32, the two
streams in turns batch by batch. --full: the tokenizers of configs/ at their published size, with weights by rule,
instead of the tiny ones of `benchmarks.tiny`.

--ids: only write the stable ids of every tokenizer as OUT (.npz). tests/fixtures/stable/ids.npz was made by the second
command: with torch's plain code without AVX, oneDNN limited to SSE 4.1 and the portable kernels.
"""

import argparse
import json
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks import harness
from benchmarks.tiny import TOKENIZERS, as_pil, by_rule, configured, images
from tokenizers_mm.models import stable

MACHINES: dict[str, dict[str, str]] = {
    "this": {},
    "avx2": harness.capped("avx2"),
    "no avx": harness.capped("portable"),
}
VARIANTS = (
    "batch 1",
    "batch 2",
    "batch 7",
    "batch 32",
    "batch 32, 2 threads",
    "batch 7, bfloat16 images",
    "batch 8, compiled by eager",
    "batch 8, compiled by aot_eager",
    "batch 8, compiled by inductor",
)
FEW_VARIANTS = ("batch 5", "batch 1", "batch 7, 2 threads", "batch 2, compiled by aot_eager")
"""For the full size, where an image takes seconds."""


def full(name: str) -> Any:
    """A tokenizer of a shipped configuration with a smaller pixel decoder, which has no part in ids."""
    path = harness.ROOT / "configs" / f"{name}.yaml"
    return by_rule(configured(path, "objective.model.config.pixel_decoder.channels=32"))


FULL: dict[str, Callable[[], Any]] = {
    "tokenflow": lambda: full("tokenflow_clipb_224"),
    "dualvitok": lambda: full("dualvitok_fix256"),
}


def encode(tokenizer: Any, x: torch.Tensor, variant: str, how: bool) -> torch.Tensor:
    """Ids of all images in a variant."""
    torch.set_num_threads(2 if "threads" in variant else 1)
    size = int(variant.split()[1].rstrip(","))
    x = x.bfloat16() if "bfloat16" in variant else x
    return torch.cat([tokenizer.encode(part, stable=how).ids for part in x.split(size)])


def recompile(tokenizer: Any, backend: str) -> None:
    """Compile the encoders in place with a backend of torch.compile."""
    torch.compiler.reset()
    for name, part in tokenizer.named_children():
        if name not in tokenizer.ONLY_DECODE and "encoder" in name:
            part._compiled_call_impl = None
            part.compile(backend=backend)


def cost(tokenizer: Any, x: torch.Tensor) -> float:
    """CPU time of stable ids over that of float32 ids, for a stream of images; the streams take turns.

    Batches are of the default size, as in `tokenizers-mm tokenize`.
    """
    torch.set_num_threads(1)
    pictures = as_pil(x)
    for how in (False, True):
        list(tokenizer.encode_batches(pictures[:64], stable=how))
    streams: dict[bool, Iterator[Any]] = {how: tokenizer.encode_batches(pictures, stable=how) for how in (False, True)}
    spent, last = {False: 0.0, True: 0.0}, {False: True, True: True}
    while any(last.values()):
        for how, stream in streams.items():
            start = time.process_time()
            last[how] = next(stream, None) is not None
            spent[how] += time.process_time() - start
    return spent[True] / spent[False]


def machine(name: str, options: argparse.Namespace) -> None:
    """All variants on one kind of machine; the float64 ids are made where nothing is limited."""
    stable.CALIBRATION = options.calibration or stable.CALIBRATION
    for family, build in tokenizers(options).items():
        tokenizer = build()
        x = images(tokenizer.image_size or ((options.side, options.side) if options.full else None), options.count)
        path = Path(options.work) / f"{family}.pt"
        if not options.full:
            if not path.exists():
                wide = stable._converted(tokenizer, torch.float64)
                with torch.no_grad():
                    torch.save(torch.cat([wide.encode_tensor(part.double()).ids for part in x.split(8)]), path)
                del wide
            tokenizer.encode(x[:64], stable=True)
        exact = torch.load(path) if path.exists() else None
        found = options.variants or (FEW_VARIANTS if options.full else VARIANTS)
        for variant in found if name == "this" else ("batch 1", "batch 32"):
            if "compiled" in variant:
                if variant.endswith("inductor") and shutil.which("c++") is None:
                    continue
                recompile(tokenizer, variant.split()[-1])
            before = tokenizer.stability
            ids = encode(tokenizer, x, variant, True)
            exact = ids if exact is None else exact
            after = tokenizer.stability
            line = {
                "machine": name,
                "tokenizer": family,
                "variant": variant,
                "ids": ids.numel(),
                "differ": int((ids != exact).sum()),
                "again": f"{after.again - before.again} of {options.count}",
                "largest": round(after.largest, 3),
            }
            print(json.dumps(line), flush=True)
        if name == "this" and not options.full:
            tokenizer = build()
            tokenizer.encode(x, stable=True)
            plain = encode(tokenizer, x.bfloat16(), "batch 7", False)
            line = {"tokenizer": family, "differ without stable, bfloat16": int((plain != exact).sum())}
            ratios = [cost(tokenizer, x) for _ in range(options.rounds)]
            line["cost"] = ", ".join(f"{100 * ratio - 100:.1f} %" for ratio in ratios)
            print(json.dumps(line), flush=True)


def tokenizers(options: argparse.Namespace) -> dict[str, Callable[[], Any]]:
    """Tokenizers that are measured, by name."""
    known = FULL if options.full else TOKENIZERS
    return {name: known[name] for name in options.tokenizers or known}


def main(arguments: Sequence[str] | None = None) -> None:
    """Run every kind of machine in a process of its own."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=512)
    parser.add_argument("--tokenizers", nargs="+", choices=tuple(TOKENIZERS))
    parser.add_argument(
        "--variants", nargs="+", choices=dict.fromkeys((*VARIANTS, *FEW_VARIANTS)), help="on this machine as it is"
    )
    parser.add_argument("--full", action="store_true")
    parser.add_argument("--side", type=int, default=256, help="of images at full size, where any size is taken")
    parser.add_argument("--calibration", type=int, help="ids, instead of the library's number")
    parser.add_argument("--rounds", type=int, default=3, help="of the cost")
    parser.add_argument("--ids", type=Path)
    parser.add_argument("--machine", choices=tuple(MACHINES), help=argparse.SUPPRESS)
    parser.add_argument("--work", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.ids is not None:
        built = {name: build() for name, build in tokenizers(options).items()}
        ids = {name: t.encode(images(t.image_size, options.count), stable=True).ids for name, t in built.items()}
        np.savez_compressed(options.ids, **{name: each.numpy().astype(np.int32) for name, each in ids.items()})
    elif options.machine is not None:
        machine(options.machine, options)
    else:
        with tempfile.TemporaryDirectory() as work:
            given = sys.argv[1:] if arguments is None else arguments
            for name in ("this",) if options.full else MACHINES:
                harness.run_alone("benchmarks.stable_ids", [*given, "--machine", name, "--work", work], MACHINES[name])


if __name__ == "__main__":
    main()
