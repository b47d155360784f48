"""Everything that only a GPU can tell, in one command: `make gpu`, or `python -m benchmarks.gpu [--out DIR]`.

Stages, each with its own limit of time, none of which stops the next: build (the CUDA library, for the GPU at hand),
tests (every test marked `cuda`), sanitizer (compute-sanitizer over small calls), benchmark (JSON, a table and a plot in
benchmarks/results), training (a short run on the GPU in bfloat16). Needs a Python with torch (GPU_PYTHON of the
Makefile), nvcc and cmake; nothing is installed and nothing is fetched. Logs are in build/gpu.

--dry-run (or GPU_DRY_RUN=1) walks the same stages on the CPU in a small form, over the library compiled for the host.

Exit code 0: all stages passed or had nothing to run; 1: one failed; 2: no GPU here, or packages are missing.
"""

import argparse
import concurrent.futures
import importlib.util
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
WORK = ROOT / "build" / "gpu"
TOTAL_SECONDS = 470
DRY_SLACK = 5
"""Factor by which the stages may take longer in a dry run."""
NEEDED = {
    "torch": "torch",
    "numpy": "numpy",
    "PIL": "pillow",
    "omegaconf": "omegaconf",
    "yaml": "pyyaml",
    "safetensors": "safetensors",
    "jaxtyping": "jaxtyping",
    "pytest": "pytest",
}
"""Modules of the stages build to benchmark, and the wheels they come in."""
NEEDED_FOR_TRAINING = {
    "accelerate": "accelerate",
    "timm": "timm",
    "einops": "einops",
    "torchvision": "torchvision",
    "huggingface_hub": "huggingface-hub",
    "tqdm": "tqdm",
}
HELPFUL = {"triton": "triton", "matplotlib": "matplotlib", "flash_kmeans": "flash-kmeans", "cuvs": "cuvs-cu13"}
PROBE = """
import json, torch
found = {"torch": torch.__version__, "cuda": torch.version.cuda, "available": torch.cuda.is_available()}
if found["available"]:
    found["gpu"], found["capability"] = torch.cuda.get_device_name(), torch.cuda.get_device_capability()
print(json.dumps(found))
"""


class StageError(Exception):
    """A stage failed; the text is its line in the summary."""


class SkippedError(Exception):
    """A stage has nothing to run here; the text says why."""


@dataclass
class Run:
    """State that the stages share."""

    dry: bool
    out: Path
    capability: tuple[int, int]
    stop: float
    environment: dict[str, str] = field(default_factory=lambda: dict(os.environ))

    def command(self, name: str, arguments: list[str], seconds: float, **environment: str) -> tuple[int, str]:
        """Exit code and output of a command, which also go to a log; code 124 where the time was up."""
        seconds = max(5.0, min(seconds, self.stop - time.monotonic()))
        process = subprocess.Popen(
            arguments,
            cwd=ROOT,
            env={**self.environment, **environment},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            start_new_session=True,
        )
        try:
            text, _ = process.communicate(timeout=seconds)
            code = process.returncode
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            text, code = process.communicate()[0] + f"\nstopped after {seconds:.0f} s\n", 124
        (WORK / f"{name}.log").write_text(" ".join(arguments) + "\n" + text)
        if code:
            print(f"---- the end of {name}.log (exit code {code})", *text.splitlines()[-30:], sep="\n", flush=True)
        return code, text

    def python(self, name: str, arguments: list[str], seconds: float, **environment: str) -> tuple[int, str]:
        return self.command(name, [sys.executable, *arguments], seconds, **environment)


def last_line(text: str, pattern: str = r"\S") -> str:
    """The last line that matches."""
    return next((line.strip() for line in reversed(text.splitlines()) if re.search(pattern, line)), "no output")


def tool(name: str, *folders: str) -> str | None:
    """A program beside this Python, on PATH or in one of the folders."""
    places = [str(Path(sys.executable).parent), os.environ.get("PATH", ""), *folders]
    return shutil.which(name, path=os.pathsep.join(places))


def build(run: Run, seconds: float) -> str:
    """Compile csrc for this GPU, or for the host; later stages find the library by the environment."""
    if run.dry:
        compiler = tool("g++")
        if compiler is None:
            raise StageError("no g++ on PATH")
        library, model = WORK / "libhost.so", ROOT / "tests" / "kernels" / "cuda_machine_host.h"
        flags = ["-x", "c++", "-std=c++17", "-O2", "-w", "-ffp-contract=off", "-fPIC", "-shared"]
        source = [f'-DTMM_MACHINE="{model}"', str(ROOT / "csrc" / "cuda_nearest.cu"), "-o", str(library)]
        code, _ = run.command("build", [compiler, *flags, *source], seconds)
    else:
        cmake, nvcc = tool("cmake"), tool("nvcc", "/usr/local/cuda/bin", f"{os.environ.get('CUDA_HOME', '')}/bin")
        if cmake is None or nvcc is None:
            raise StageError("needs cmake (a wheel: cmake) and nvcc 12.4 or later (the CUDA toolkit) on PATH")
        major, minor = run.capability
        architecture = "90a" if (major, minor) == (9, 0) else f"{major}{minor}"
        folder = WORK / f"sm_{architecture}"
        library = folder / "libtokenizers_mm_cuda.so"
        ninja = tool("ninja")
        generator = ["-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={ninja}"] if ninja else []
        chosen = {"TOKENIZERS_MM_BUILD_CUDA": "1", "TOKENIZERS_MM_CUDA_ARCHITECTURES": architecture}
        chosen["PATH"] = f"{Path(nvcc).parent}{os.pathsep}{os.environ.get('PATH', '')}"
        begin = time.monotonic()
        code, _ = run.command("configure", [cmake, "-S", str(ROOT), "-B", str(folder), *generator], seconds, **chosen)
        if code == 0:
            target = [cmake, "--build", str(folder), "--target", "tokenizers_mm_cuda"]
            code, _ = run.command("build", target, seconds - (time.monotonic() - begin), **chosen)
    if code or not library.is_file():
        raise StageError(f"exit code {code}")
    run.environment["TOKENIZERS_MM_CUDA_LIBRARY"] = str(library)
    return str(library.relative_to(ROOT))


def tests(run: Run, seconds: float) -> str:
    """Every test marked `cuda`; in a dry run, a few over the host model."""
    marked = [path for path in sorted((ROOT / "tests").rglob("test_*.py")) if "mark.cuda" in path.read_text()]
    chosen = ["-m", "cuda", *(str(path.relative_to(ROOT)) for path in marked)]
    if run.dry:
        chosen = ["tests/kernels/test_cuda_machine.py", "-k", "no_rows or few_codes"]
    # Not the settings of pyproject.toml: they need plugins that a GPU machine may lack, and make warnings errors.
    plain = ["-o", "addopts=", "-o", "filterwarnings=", "-p", "no:cacheprovider", "-q", "-rfE", "--durations=5"]
    code, text = run.python("tests", ["-m", "pytest", *plain, *chosen], seconds)
    line = last_line(text, r"\d+ (passed|failed|error|skipped|deselected)|no tests ran")
    if code or " passed" not in line:
        raise StageError(line if code != 124 else f"time is up; {line}")
    return line.strip("= ")


def sanitizer(run: Run, seconds: float) -> str:
    """Memory errors, races and barriers under compute-sanitizer, three runs at a time; in a dry run, the bare calls."""
    module = ["-m", "tests.kernels.cuda_small"]
    if run.dry:
        code, text = run.python("small", [*module, "cpu"], seconds)
        if code:
            raise StageError(last_line(text))
        return last_line(text)
    program = tool("compute-sanitizer", "/usr/local/cuda/bin", "/usr/local/cuda/compute-sanitizer")
    if program is None:
        raise SkippedError("compute-sanitizer is not installed")

    def check(name: str) -> tuple[int, str]:
        options = ["--tool", name, "--error-exitcode", "9"]
        options += ["--report-api-errors", "no"] if name == "memcheck" else []
        # Without the caching allocator every tensor has an allocation of its own, and so an end that can be overrun.
        alone = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
        return run.command(name, [program, *options, sys.executable, *module], seconds, **alone)

    names = ["memcheck", "racecheck", "synccheck"]
    with concurrent.futures.ThreadPoolExecutor() as pool:
        results = dict(zip(names, pool.map(check, names), strict=True))
    lines = [f"{name}: {last_line(text, 'SUMMARY|stopped after').strip('= ')}" for name, (_, text) in results.items()]
    if any(code for code, _ in results.values()):
        raise StageError("; ".join(lines))
    return "; ".join(lines)


def benchmark(run: Run, seconds: float) -> str:
    """The grid against its peers; the benchmark leaves what it has when its time is up."""
    arguments = ["-m", "benchmarks.gpu_nearest_code", "--out", str(run.out), "--seconds", str(int(seconds - 25))]
    interpreted = {"TRITON_INTERPRET": "1"} if run.dry else {}
    code, text = run.python("benchmark", [*arguments, *(["--tiny"] if run.dry else [])], seconds, **interpreted)
    if code:
        raise StageError(last_line(text))
    return last_line(text)


def training(run: Run, seconds: float) -> str:
    """A short run of configs/debug.yaml in bfloat16, on a GPU with torch.compile."""
    lacking = missing(NEEDED_FOR_TRAINING)
    if lacking:
        raise SkippedError(f"missing packages: {' '.join(lacking)}")
    shutil.rmtree(WORK / "training", ignore_errors=True)
    arguments = ["-m", "train", "configs/debug.yaml", f"out={WORK / 'training'}", "precision=bf16", "trackers=[]"]
    arguments += ["steps=2", "device=cpu"] if run.dry else ["steps=20", "device=cuda", "compile=inductor"]
    begin = time.monotonic()
    code, text = run.python("training", arguments, seconds)
    if code:
        raise StageError(f"exit code {code}, {last_line(text)}")
    loss = re.findall(r"loss[= ]([-+0-9.e]+|nan|inf)", text)
    if loss and loss[-1] in ("nan", "inf"):
        raise StageError(f"the loss is {loss[-1]}")
    return f"{time.monotonic() - begin:.0f} s, last loss {loss[-1] if loss else 'not shown'}"


STAGES: dict[str, tuple[Callable[[Run, float], str], float]] = {
    "build": (build, 90),
    "tests": (tests, 180),
    "sanitizer": (sanitizer, 75),
    "benchmark": (benchmark, 200),
    "training": (training, 180),
}
RESERVED = {"tests": 200, "sanitizer": 150, "benchmark": 45}
"""Seconds that a stage leaves to those after it."""


def missing(modules: dict[str, str]) -> list[str]:
    """Wheels of the modules that this Python lacks."""
    return [wheel for module, wheel in modules.items() if importlib.util.find_spec(module) is None]


def probe() -> dict:
    """Properties of the GPU as torch reports them."""
    done = subprocess.run([sys.executable, "-c", PROBE], capture_output=True, text=True, check=False)
    return json.loads(done.stdout) if done.returncode == 0 else {"available": False}


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results")
    parser.add_argument("--stages", nargs="+", choices=STAGES, default=list(STAGES))
    parser.add_argument("--dry-run", action="store_true", default=os.environ.get("GPU_DRY_RUN", "") not in ("", "0"))
    options = parser.parse_args(arguments)
    lacking = missing(NEEDED)
    if lacking:
        print(f"make gpu: {sys.executable} lacks packages; install, or carry the wheels of: {' '.join(lacking)}")
        return 2
    found = probe()
    if not found["available"] and not options.dry_run:
        print("make gpu: torch sees no CUDA device here (GPU_DRY_RUN=1 walks the stages on the CPU)")
        return 2
    print(f"make gpu: {found}, Python {sys.version.split()[0]}", flush=True)
    less = missing({**HELPFUL, **NEEDED_FOR_TRAINING})
    if less:
        print(f"not installed, and done without: {' '.join(less)}")
    WORK.mkdir(parents=True, exist_ok=True)
    capability = tuple(found.get("capability", (9, 0)))
    slack = DRY_SLACK if options.dry_run else 1
    run = Run(options.dry_run, options.out.resolve(), capability, time.monotonic() + slack * TOTAL_SECONDS)
    run.environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    summary, failed, built = [], False, "build" not in options.stages
    for name in options.stages:
        stage, seconds = STAGES[name]
        begin = time.monotonic()
        seconds = min(slack * seconds, run.stop - begin - RESERVED.get(name, 0))
        try:
            if not built and name in ("tests", "sanitizer", "benchmark") and "build" in options.stages:
                raise SkippedError("there is no library")
            if seconds < 5:
                raise SkippedError("no time is left")
            state, line = "passed", stage(run, seconds)
            built = built or name == "build"
        except StageError as error:
            state, line, failed = "FAILED", str(error), True
        except SkippedError as error:
            state, line = "skipped", str(error)
        summary.append(f"{name:<10} {state:<8} {time.monotonic() - begin:4.0f} s  {line}")
        print(summary[-1], flush=True)
    text = "\n".join(["", f"make gpu on {found.get('gpu', 'the CPU (dry run)')}:", *summary])
    print(text)
    (WORK / "summary.txt").write_text(text + "\n")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
