"""CPU time of `tokenizers-mm encode FOLDER` on top of that of the bare model, the two in turns in one process.

    python -m benchmarks.encode_folder [--tokenizer tokenizers_mm/demo-64] [--count 512] [--side 80] [--rounds 5]

The bare model encodes tensors that are ready, in batches of every size of --batches; its best one counts. The folder is
read, cut to size, encoded and written, in batches of the default size. Prints milliseconds per image: of the
model by batch size, of the thread that runs the model, and of all threads (the rest reads images ahead, on other cores
where there are any); and the throughput relative to the bare model.
"""

import contextlib
import io
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch

from benchmarks import harness
from tokenizers_mm import load
from tokenizers_mm.cli import main as command
from tokenizers_mm.data.photographs import fixed_crops


def write_images(folder: Path, count: int, side: int) -> None:
    """Crops of photographs, side x side pixels, as PNG files."""
    for index, crop in enumerate(fixed_crops("train", count, side)):
        crop.save(folder / f"{index:05d}.png")


def spent(run: Callable[[], object]) -> tuple[float, float]:
    """Seconds of CPU that a call takes, of this thread and of all threads."""
    start = time.thread_time(), time.process_time()
    run()
    return time.thread_time() - start[0], time.process_time() - start[1]


def main(arguments: Sequence[str] | None = None) -> None:
    parser = harness.parser(__doc__)
    parser.add_argument("--tokenizer", default="tokenizers_mm/demo-64")
    parser.add_argument("--count", type=int, default=512)
    parser.add_argument("--side", type=int, default=80)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--batches", type=int, nargs="+", default=[4, 8, 16, 32])
    parser.add_argument("--ending", default="parquet", help="of the file that is written (default: %(default)s)")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    tokenizer = load(options.tokenizer)
    size = tokenizer.image_size or (256, 256)
    x = torch.rand(options.count, 3, *size, generator=torch.Generator().manual_seed(0)) * 2 - 1
    per_image = 1e3 / options.count

    def bare(batch: int) -> None:
        with torch.no_grad():
            for part in x.split(batch):
                tokenizer.encode_tensor(part)

    with tempfile.TemporaryDirectory() as work:
        (Path(work) / "images").mkdir()
        write_images(Path(work) / "images", options.count, options.side)
        verb = ["encode", f"{work}/images", "--tokenizer", options.tokenizer, "--fit", "crop", "--out"]
        bare_times: dict[int, list[float]] = {batch: [] for batch in options.batches}
        folder_times: list[tuple[float, float]] = []
        for turn in range(options.rounds + 1):
            for batch, times in bare_times.items():
                times.append(spent(lambda batch=batch: bare(batch))[0] * per_image)
            with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
                one, every = spent(lambda turn=turn: command([*verb, f"{work}/{turn}.{options.ending}"]))
                started = spent(lambda: load(options.tokenizer).fingerprint())[0]
            folder_times.append(((one - started) * per_image, (every - started) * per_image))
    model = {batch: float(np.median(times[1:])) for batch, times in bare_times.items()}
    best = min(model, key=lambda batch: model[batch])
    thread, process = (float(np.median([times[k] for times in folder_times[1:]])) for k in (0, 1))
    print("bare model, ms per image:", ", ".join(f"{time:.3f} at batch {batch}" for batch, time in model.items()))
    print(f"folder, ms per image: {thread:.3f} of the thread with the model, {process:.3f} of all threads")
    if options.record:
        row = {"bare": model[best], "thread": thread, "process": process, "batch": best, "images": options.count}
        about = {"tokenizer": Path(options.tokenizer).name, **harness.machine()}
        harness.record("encode_folder", row, about)
    print(f"throughput relative to the bare model at batch {best}: {model[best] / thread:.3f}", end="")
    print(f" with readers on another core, {model[best] / process:.3f} on one core")


if __name__ == "__main__":
    main()
