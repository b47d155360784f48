"""nearest_code on a GPU against cdist, chunked addmm, torch.compile, Triton, cuVS and flash-kmeans.

    python -m benchmarks.gpu_nearest_code [--out benchmarks/results] [--seconds 180] [--tiny]

Every method runs in one process, interleaved. "call" is the time of one call among many queued ones, launches included;
"device" that of a replayed graph, without them. Methods in half precision get inputs that are converted beforehand.
"ours" packs the codebook in the call, "ours, kept" finds it packed and checks it. Wrong ids are counted on a sample of
tokens against float64. --tiny walks the program on the CPU, over the CUDA library compiled for the host.
"""

import argparse
import contextlib
import json
import random
import re
import statistics
import subprocess
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from benchmarks import harness
from benchmarks.nearest_code import DATA, GRID, addmm, cdist, make
from benchmarks.nearest_code import chunked as chunked_by
from tokenizers_mm import kernels
from tokenizers_mm.kernels import _cuda, reference

SHAPES = ("G1", "G2", "G3", "G4", "G5")
FEW = (1, 64, 1024)
chunked = chunked_by(256 << 20)
"""Plain torch without a large table; the precision is that of the inputs."""
MAX_TABLE_BYTES = 5 << 30
"""Methods that hold an N x K table of float32 larger than this are left out."""
SAMPLE = 512
ROUNDS = 15
EXACT = ("ours", "ours, kept", "ours, margin")
Method = Callable[[], Tensor]

PEER_ERRORS: tuple[type[BaseException], ...] = (RuntimeError, ImportError, AttributeError, TypeError, ValueError)
with contextlib.suppress(ImportError):
    from triton.runtime.errors import TritonError

    PEER_ERRORS = (*PEER_ERRORS, TritonError)


def search(z: Tensor, c: Tensor) -> Tensor:
    return kernels.nearest_code(z, c) if z.device.type == "cuda" else _cuda.nearest_code(z, c)[0]


def ours(z: Tensor, c: Tensor) -> Tensor:
    """As in training, where every step changes the codebook."""
    increment_version(c)
    return search(z, c)


def margin(z: Tensor, c: Tensor) -> Tensor:
    increment_version(c)
    return _cuda.search((z,), (c,), (1.0,), margin=True)[0]


def triton_method(z: Tensor, c: Tensor) -> Method:
    """The fastest of a few shapes."""
    from benchmarks import triton_assign

    def run(shape: triton_assign.Shape) -> Method:
        return lambda: triton_assign.assign(z, c, shape)

    candidates = [run(shape) for shape in triton_assign.shapes(z)]
    if z.device.type != "cuda":
        return candidates[0]
    timed = []
    for candidate in candidates:
        with contextlib.suppress(*PEER_ERRORS):  # too much shared memory on this GPU
            candidate()
            timed.append((elapsed(candidate, 3, "cuda"), len(timed), candidate))
    if not timed:
        raise RuntimeError("no shape fits this GPU")
    return min(timed)[2]


def flash_kmeans(z: Tensor, c: Tensor) -> Method:
    from flash_kmeans.assign_euclid_triton import euclid_assign_triton  # pyright: ignore[reportMissingImports]

    half, codes = z.half()[None], c.half()[None]
    norms = half.float().square().sum(-1)
    return lambda: euclid_assign_triton(half, codes, norms)[0]


def cuvs(z: Tensor, c: Tensor) -> Method:
    from cuvs.neighbors import brute_force  # pyright: ignore[reportMissingImports]

    return lambda: torch.as_tensor(brute_force.search(brute_force.build(c), z, 1)[1], device=z.device).view(-1)


def methods(z: Tensor, c: Tensor, which: str, notes: list[str]) -> dict[str, Method]:
    """Methods for a case: `which` is "all", "few" or "main". What cannot be had is noted."""
    changing = c.clone()
    ready: dict[str, Method] = {
        "ours": lambda: ours(z, changing),
        "ours, kept": lambda: search(z, c),
        "chunked addmm fp32": lambda: chunked(z, c),
    }
    makers: dict[str, Callable[[], Method]] = {"Triton fp16": lambda: triton_method(z.half(), c.half())}
    if which == "all":
        half = z.bfloat16(), c.bfloat16()
        ready |= {"ours, margin": lambda: margin(z, changing), "chunked addmm bf16": lambda: chunked(*half)}
        makers |= {
            "Triton tf32x3": lambda: triton_method(z, c),
            "flash-kmeans fp16": lambda: flash_kmeans(z, c),
            "cuVS": lambda: cuvs(z, c),
        }
    if which in ("all", "few"):
        if 4 * len(z) * len(c) <= MAX_TABLE_BYTES:
            ready["cdist+argmin"] = lambda: cdist(z, c)
            if which == "all" and z.device.type == "cuda":
                compiled = torch.compile(addmm, dynamic=False)
                ready["torch.compile"] = lambda: compiled(z, c)
        else:
            notes.append(f"cdist and torch.compile left out: their table takes {4e-9 * len(z) * len(c):.0f} GB")
    for name, make_method in makers.items():
        try:
            ready[name] = make_method()
        except PEER_ERRORS as error:
            notes.append(f"{name}: {first_line(error)}")
    return ready


def first_line(error: BaseException) -> str:
    return f"{type(error).__name__} {str(error).strip().partition(chr(10))[0]}"[:160]


def elapsed(method: Callable[[], Any], repeats: int, device: str) -> float:
    """Milliseconds of one of `repeats` queued calls."""
    if device != "cuda":
        start = time.perf_counter()
        for _ in range(repeats):
            method()
        return 1e3 * (time.perf_counter() - start) / repeats
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    for _ in range(repeats):
        method()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / repeats


def capture(name: str, method: Method, c: Tensor) -> Callable[[], None] | None:
    """The method as a graph to replay; None if it waits for the device."""
    if c.device.type != "cuda" or name == "cuVS":
        return None
    graph, pack = torch.cuda.CUDAGraph(), _cuda.packs.get((c,), (1.0,))[0]
    kept = mock.patch.object(_cuda.packs, "get", return_value=(pack, True))  # by itself, a search in a graph packs
    with kept if name == "ours, kept" else contextlib.nullcontext(), torch.cuda.graph(graph):
        method()

    def replay(keep: object = pack) -> None:
        graph.replay()

    return replay


class Judge:
    """Counts the ids of a sample of tokens at which the float64 distance is not the least."""

    def __init__(self, z: Tensor, c: Tensor) -> None:
        self.rows = torch.linspace(0, len(z) - 1, min(SAMPLE, len(z))).long().to(z.device)
        self.tokens, self.codes = z[self.rows].double(), c
        self.least = reference.nearest_code(self.tokens, c)[1]

    def wrong(self, ids: Tensor) -> int:
        chosen = self.codes[ids[self.rows].long().clamp(0, len(self.codes) - 1)]
        return int(((self.tokens - chosen.double()).square().sum(1) > self.least * (1 + 1e-12)).sum())


def measure(z: Tensor, c: Tensor, which: str, seconds: float) -> dict[str, Any]:
    """Times in ms and wrong ids of every method that runs."""
    device, notes = z.device.type, []
    ready = methods(z, c, which, notes)
    runs: dict[tuple[str, str], tuple[Callable[[], Any], int]] = {}
    wrong: dict[str, int] = {}
    judge = Judge(z, c)
    for name, method in ready.items():
        try:
            wrong[name] = judge.wrong(method())
            method()
            forms = {"call": method, "device": capture(name, method, c)}
            for form, run in forms.items():
                if run is not None:
                    run()
                    repeats = max(1, min(50, int(3.0 / max(elapsed(run, 1, device), 1e-3))))
                    runs[name, form] = (run, repeats)
        except PEER_ERRORS as error:
            wrong.pop(name, None)
            notes.append(f"{name}: {first_line(error)}")
            if name in EXACT:
                raise
    times: dict[tuple[str, str], list[float]] = {key: [] for key in runs}
    order, shuffle, stop = list(runs), random.Random(0).shuffle, time.monotonic() + seconds
    for count in range(ROUNDS):
        shuffle(order)
        for key in order:
            times[key].append(elapsed(*runs[key], device))
        if count >= 2 and time.monotonic() > stop:
            break
    milliseconds: dict[str, dict[str, float]] = {}
    for (name, form), values in times.items():
        milliseconds.setdefault(name, {})[form] = statistics.median(values)
    return {"milliseconds": milliseconds, "wrong": wrong, "sample": min(SAMPLE, len(z)), "notes": notes}


def best_time(times: dict[str, float]) -> float:
    return times.get("device", times["call"])


def ceilings(device: str) -> dict[str, float]:
    """Measured bf16 matrix rate in TFLOP/s and copy bandwidth in TB/s."""
    size = 8192 if device == "cuda" else 64
    left, right = (torch.randn(size, size, device=device).bfloat16() for _ in range(2))
    source = torch.randn(size * size * 4, device=device)
    target = torch.empty_like(source)
    rate: list[float] = []
    bandwidth: list[float] = []
    for _ in range(5):
        rate.append(2e-9 * size**3 / elapsed(lambda: left @ right, 5, device))
        bandwidth.append(8e-9 * source.numel() / elapsed(lambda: target.copy_(source), 5, device))
    return {"bf16_tflops": statistics.median(rate), "copy_tb_per_s": statistics.median(bandwidth)}


def about(device: str) -> dict[str, Any]:
    """GPU, driver, versions, date."""
    info = harness.machine(device)
    info["cuda"] = torch.version.cuda
    for package in ("triton", "flash-kmeans", "cuvs-cu13", "cuvs-cu12"):
        info[package] = harness.version(package)
    if device == "cuda":
        properties = torch.cuda.get_device_properties(0)
        info |= {"multiprocessors": properties.multi_processor_count, "memory_gb": round(properties.total_memory / 1e9)}
        with contextlib.suppress(OSError, subprocess.SubprocessError):
            query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
            info["driver"] = subprocess.run(query, capture_output=True, text=True, timeout=20).stdout.split("\n")[0]
    return info


def plan(tiny: bool) -> list[tuple[str, str, str, int, int, int]]:
    """(name, data, methods, N, K, D), the most wanted first."""
    if tiny:
        return [("G1", "gauss", "all", 4, 300, 8), ("G1 N=1", "gauss", "few", 1, 300, 8)]
    cases = [(name, "gauss", "all", *GRID[name]) for name in SHAPES]
    cases += [(f"{name} N={n}", "gauss", "few", n, *GRID[name][1:]) for name in ("G1", "G3") for n in FEW]
    cases += [(name, kind, "main", *GRID[name]) for kind in DATA[1:] for name in SHAPES]
    return cases


def report(results: dict[str, Any]) -> str:
    """The table as Markdown: one line per case first, then every method of every case."""
    info, ceiling = results["about"], results["ceilings"]
    lines = [
        f"# nearest_code on {info['gpu'] or 'the host model of a GPU (a dry run: no time here means anything)'}",
        "",
        f"{info['date']}, driver {info.get('driver')}, CUDA {info['cuda']}, torch {info['torch']}, triton "
        f"{info['triton']}, commit {info['commit']}. Measured ceilings: {ceiling['bf16_tflops']:.0f} TFLOP/s (bf16 "
        f"matrix product), {ceiling['copy_tb_per_s']:.2f} TB/s (copy). Times are medians in ms; `make gpu` wrote this.",
        "",
        "| case | data | N | K | D | ours | kept | best peer | its time / ours | its time / kept | of bf16 ceiling |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in results["cases"]:
        times = {name: best_time(value) for name, value in row["milliseconds"].items()}
        peers = {name: value for name, value in times.items() if name not in EXACT}
        name = min(peers, key=peers.__getitem__) if peers else "none"
        peer, kept = peers.get(name, float("nan")), times["ours, kept"]
        share = 2e-9 * row["n"] * row["k"] * row["d"] / kept / ceiling["bf16_tflops"]
        lines.append(
            f"| {row['case']} | {row['data']} | {row['n']} | {row['k']} | {row['d']} "
            f"| {times['ours']:.4f} | {kept:.4f} | {name} | {peer / times['ours']:.2f} | {peer / kept:.2f} "
            f"| {share:.1%} |"
        )
    for row in results["cases"]:
        lines += [
            "",
            f"## {row['case']}: N={row['n']} K={row['k']} D={row['d']}, {row['data']}",
            "",
            f"| method | device | call | device time / ours | wrong ids of {row['sample']} |",
            "|---|---|---|---|---|",
        ]
        base = best_time(row["milliseconds"]["ours"])
        for name, times in sorted(row["milliseconds"].items(), key=lambda item: best_time(item[1])):
            device = f"{times['device']:.4f}" if "device" in times else ""
            ratio = best_time(times) / base
            lines.append(f"| {name} | {device} | {times['call']:.4f} | {ratio:.2f} | {row['wrong'][name]} |")
        lines += ["", *row["notes"]] if row["notes"] else []
    lines += ["", *results["notes"]] if results["notes"] else []
    return "\n".join(lines) + "\n"


def plot(results: dict[str, Any], path: Path) -> bool:
    """Bars of time / ours, for the cases with all methods; False without matplotlib."""
    try:
        import matplotlib

        matplotlib.use("Agg")
        from matplotlib import pyplot
    except ImportError:
        return False
    rows = [row for row in results["cases"] if len(row["milliseconds"]) > 5] or results["cases"]
    names = list(dict.fromkeys(name for row in rows for name in row["milliseconds"]))
    figure, axes = pyplot.subplots(figsize=(10, 4.5))
    for i, name in enumerate(names):
        heights = [
            best_time(row["milliseconds"][name]) / best_time(row["milliseconds"]["ours"])
            if name in row["milliseconds"]
            else 0.0
            for row in rows
        ]
        axes.bar([x + 0.8 * i / len(names) for x in range(len(rows))], heights, 0.8 / len(names), label=name)
    axes.set_yscale("log")
    axes.axhline(1.0, color="black", linewidth=0.8)
    axes.set_xticks([x + 0.4 for x in range(len(rows))], [f"{row['case']} {row['data']}" for row in rows])
    axes.set_ylabel("time / ours")
    axes.set_title(f"Nearest code on {results['about']['gpu'] or 'the host model'}")
    axes.legend(fontsize=7, ncols=2)
    figure.tight_layout()
    figure.savefig(path, dpi=140)
    return True


def write(results: dict[str, Any], folder: Path) -> str:
    """JSON, table and plot; the name of the files without their ending."""
    gpu = results["about"]["gpu"]
    name = f"gpu_{re.sub(r'[^a-z0-9]+', '_', gpu.lower()) if gpu else 'dry_run'}"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{name}.json").write_text(json.dumps(results, indent=1) + "\n")
    (folder / f"{name}.md").write_text(report(results))
    if not plot(results, folder / f"{name}.png"):
        print("no plot: matplotlib is not installed")
    return name


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=harness.RESULTS)
    parser.add_argument("--seconds", type=float, default=180.0, help="no case is begun after this")
    parser.add_argument("--tiny", action="store_true", help="two small cases on the CPU")
    options = parser.parse_args(arguments)
    stop = time.monotonic() + options.seconds
    device = "cpu" if options.tiny else "cuda"
    cases = plan(options.tiny)
    results: dict[str, Any] = {"about": about(device), "ceilings": ceilings(device), "cases": [], "notes": []}
    print(results["about"], results["ceilings"], flush=True)
    wrong = 0
    for i, (case, data, which, n, k, d) in enumerate(cases):
        if time.monotonic() > stop:
            results["notes"].append(f"Not run, for want of time: {', '.join(f'{c[0]} {c[1]}' for c in cases[i:])}.")
            break
        z, c = (tensor.to(device) for tensor in make(data, n, k, d))
        row = measure(z, c, which, seconds=2.0)
        results["cases"].append({"case": case, "data": data, "n": n, "k": k, "d": d, **row})
        wrong += sum(row["wrong"][name] for name in EXACT if name in row["wrong"])
        times = {name: round(best_time(value), 4) for name, value in row["milliseconds"].items()}
        print(f"{case} {data}: {times} wrong {row['wrong']} {row['notes']}", flush=True)
        if device == "cuda":
            torch.cuda.empty_cache()
        write(results, options.out)  # after every case: a run that is cut off leaves what it has
    name = write(results, options.out)
    print(f"{len(results['cases'])} of {len(cases)} cases in {name}.json, {wrong} wrong ids of ours")
    if wrong:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
