"""Images per second, peak memory, the quantizers' share of `encode` and `decode`, in float32 and under bf16 autocast.

    python -m benchmarks.encode_decode TOKENIZER [--size 256] [--batch 1] [--rounds 5] [--threads 2] [--device cuda]
                                                 [--record]

TOKENIZER is a saved tokenizer, or a training configuration (configs/NAME.yaml), whose model is built with random
weights: time and memory do not depend on them. Columns:

    images/s     median over the rounds, all precisions and verbs interleaved
    peak MB      weights and what the call needs on top of them
    of bound     the same over weights and the largest operation: its input, its output and the skip it bypasses
    quantizer    share of the time that the search (or look-up) takes
    ids changed  against float32: the features are rounded under autocast; of the same features the ids are the same,
                 because the search always runs in float32, which is checked here
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

from benchmarks import harness
from benchmarks.tiny import configured
from tokenizers_mm import load
from tokenizers_mm._check import require
from tokenizers_mm.layers.attention import Block
from tokenizers_mm.layers.conv import ConvAttention, ResBlock
from tokenizers_mm.models import ImageTokenizer
from tokenizers_mm.quantizers import Quantizer

RESIDUAL = (ResBlock, ConvAttention, Block)
"""Modules whose input stays alive until their end."""

Row = dict[str, float | str | int | None]


def tokenizer_from(source: str, device: str) -> ImageTokenizer[Any]:
    """A saved tokenizer with ids, or that of a training configuration with random weights."""
    tokenizer = configured(source) if Path(source).suffix in (".yaml", ".yml") else load(source)
    require(bool(tokenizer.quantizers()), "TOKENIZER", "one with ids", f"a continuous one: {source}")
    return tokenizer.eval().to(device)


def autocast(precision: str, device: str) -> AbstractContextManager:
    """The context of a precision."""
    return torch.autocast(device.split(":")[0], torch.bfloat16) if precision == "bf16" else nullcontext()


def searches(tokenizer: ImageTokenizer[Any], x: Tensor) -> list[tuple[Quantizer, Tensor]]:
    """Quantizers that `encode` calls, in order, and the features [B, h, w, D] that they are given."""
    found: list[tuple[Quantizer, Tensor]] = []
    with ExitStack() as stack:
        for quantizer in tokenizer.quantizers().values():

            def watch(z: Tensor, *rest: Any, of: Quantizer = quantizer, original: Any = quantizer.quantize) -> Any:
                found.append((of, z))
                return original(z, *rest)

            stack.enter_context(mock.patch.object(quantizer, "quantize", watch))
        tokenizer.encode(x)
    return found


def largest_operation(model: nn.Module, call: Callable[[], object]) -> int:
    """Bytes of the operation that needs most: input, output, and the input of the residual block around it."""
    skips: list[Tensor] = []
    largest = 0

    def begin(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        skips.append(inputs[0])

    def end(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        skips.pop()

    def leaf(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        nonlocal largest
        held = {t.untyped_storage().data_ptr(): t.nbytes for t in (*skips[-1:], *inputs[:1], output)}
        largest = max(largest, sum(held.values()))

    handles = []
    for module in model.modules():
        if isinstance(module, RESIDUAL):
            handles += [module.register_forward_pre_hook(begin), module.register_forward_hook(end)]
        elif not list(module.children()) and not isinstance(module, nn.Identity):
            handles.append(module.register_forward_hook(leaf))
    call()
    for handle in handles:
        handle.remove()
    return largest


def measure(tokenizer: ImageTokenizer[Any], size: int, batch: int, rounds: int, device: str) -> list[Row]:
    """One row per verb and precision. size: side of the images, where the tokenizer does not say it."""
    height, width = tokenizer.image_size or (size, size)
    x = torch.rand(batch, 3, height, width, generator=torch.Generator().manual_seed(0)).mul(2).sub(1).to(device)
    codes, given = tokenizer.encode(x), searches(tokenizer, x)
    verbs: dict[str, tuple[Callable[[], object], Callable[[], object]]] = {
        "encode": (lambda: tokenizer.encode(x), lambda: [quantizer.quantize(z) for quantizer, z in given]),
        "decode": (lambda: tokenizer.decode(codes), lambda: tokenizer.vectors(codes)),
    }

    def within(precision: str, call: Callable[[], object]) -> Callable[[], object]:
        def run() -> object:
            with autocast(precision, device):
                return call()

        return run

    methods = {
        f"{verb} {precision} {part}": within(precision, call)
        for verb, calls in verbs.items()
        for precision in ("fp32", "bf16")
        for part, call in zip(("all", "quantizer"), calls, strict=True)
    }
    times = harness.interleave(methods, rounds, device)
    weights = sum(t.nbytes for t in tokenizer.state_dict().values()) / 1e6
    rows: list[Row] = []
    for verb, (call, _) in verbs.items():
        for precision in ("fp32", "bf16"):
            run, name = methods[f"{verb} {precision} all"], f"{verb} {precision}"
            extra = harness.peak_extra_megabytes(run, device)
            bound = weights + largest_operation(tokenizer, within(precision, call)) / 1e6
            rows.append(
                {
                    "case": name,
                    "images_per_s": 1e3 * batch / times[f"{name} all"],
                    "weights_mb": weights,
                    "peak_mb": None if extra is None else weights + extra,
                    "over_bound": None if extra is None else (weights + extra) / bound,
                    "quantizer_share": times[f"{name} quantizer"] / times[f"{name} all"],
                    "ids_changed": changed(tokenizer, x, precision, device) if verb == "encode" else None,
                }
            )
    return rows


def changed(tokenizer: ImageTokenizer[Any], x: Tensor, precision: str, device: str) -> float:
    """Share of ids that differ from float32; fails if autocast reaches the search itself."""
    exact = tokenizer.encode(x).ids
    with autocast(precision, device):
        ids, given = tokenizer.encode(x).ids, searches(tokenizer, x)
        inside = [quantizer.quantize(z).ids for quantizer, z in given]
    outside = [quantizer.quantize(z.float()).ids for quantizer, z in given]
    assert all(map(torch.equal, inside, outside)), "the search left float32"
    return float((ids != exact).double().mean())


@torch.inference_mode()
def main(arguments: Sequence[str] | None = None) -> None:
    parser = harness.parser(__doc__)
    parser.add_argument("tokenizer", metavar="TOKENIZER")
    parser.add_argument("--size", type=int, default=256, help="side of the images, for a tokenizer of any size")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args(arguments)
    if options.threads:
        torch.set_num_threads(options.threads)
    tokenizer = tokenizer_from(options.tokenizer, options.device)
    lines = [["", "images/s", "peak MB", "of bound", "quantizer", "ids changed"]]
    for row in measure(tokenizer, options.size, options.batch, options.rounds, options.device):
        cells = [row["images_per_s"], row["peak_mb"], row["over_bound"], row["quantizer_share"], row["ids_changed"]]
        shapes = ("{:.3f}", "{:.0f}", "{:.2f}", "{:.1%}", "{:.2%}")
        shown = ["-" if c is None else shape.format(c) for shape, c in zip(shapes, cells, strict=True)]
        lines.append([str(row["case"]), *shown])
        if options.record:
            name, threads = Path(options.tokenizer).name, torch.get_num_threads()
            about = {"tokenizer": name, "batch": options.batch, **harness.machine(options.device)}
            harness.record("encode_decode", {**row, "threads": threads}, about)
    print(harness.table(lines))


if __name__ == "__main__":
    main()
