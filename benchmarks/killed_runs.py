"""Are the shards of a run that was killed again and again those of an unbroken run, byte for byte?

    python -m benchmarks.killed_runs [--count N] [--kills N] [--workers N] [--shard-size N]

Renders N scenes of 32 x 32 pixels as JPEG files with captions in one tar file, a hundredth of them broken, and makes
shards of ids with `tokenizers-mm tokenize` and the tiny VQGAN of `benchmarks.tiny`: once unbroken by one process,
once by worker processes that get a SIGKILL at shards drawn at random. Prints a line: shards, ids, kills, files that
differ (the manifest among them), samples that are missing or there twice. Exit code 1 where there are any.
"""

import argparse
import io
import json
import random
import signal
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from benchmarks.tiny import TOKENIZERS
from tokenizers_mm.data.scenes import make_scene
from tokenizers_mm.data.token_shards import DONE, read_shards


def write_images(path: Path, count: int) -> None:
    """Scenes as JPEG files with captions in a tar file; every hundredth is no image."""
    with tarfile.open(path, "w") as archive:
        for number in range(count):
            scene, stream = make_scene(number), io.BytesIO(b"no image")
            if number % 100 != 50:
                scene.render(32).save(stream, format="JPEG")
            for ending, data in (("jpg", stream.getvalue()), ("txt", scene.caption.encode())):
                member = tarfile.TarInfo(f"{number:06d}.{ending}")
                member.size = len(data)
                archive.addfile(member, io.BytesIO(data))


def start(work: Path, out: str, options: argparse.Namespace, workers: int) -> "subprocess.Popen[bytes]":
    """The command that makes the shards, as a process."""
    command = ["tokenize", work / "images.tar", "--out", work / out, "--tokenizer", work / "tokenizer"]
    command += ["--shard-size", options.shard_size, "--workers", workers]
    run = [sys.executable, "-m", "tokenizers_mm.cli", *map(str, command)]
    return subprocess.Popen(run, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def run_killed(work: Path, options: argparse.Namespace) -> int:
    """The same run, killed where its number of finished shards passes numbers drawn at random; returns how often."""
    shards = -(-options.count // options.shard_size)
    places = sorted(random.Random(0).sample(range(1, shards), options.kills))
    done, killed = work / "killed" / DONE, 0
    while True:
        process = start(work, "killed", options, options.workers)
        while process.poll() is None:
            if killed < len(places) and len(list(done.glob("0*.json"))) >= places[killed]:
                process.send_signal(signal.SIGKILL)
                process.wait()
                killed += 1
                break
            time.sleep(0.005)
        if process.wait() == 0:
            return killed


def contents(folder: Path) -> dict[str, bytes]:
    """Every file of a folder."""
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def main(arguments: Sequence[str] | None = None) -> None:
    """Make both, compare, and print a line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=20_000)
    parser.add_argument("--kills", type=int, default=6)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--shard-size", type=int, default=500)
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        write_images(work / "images.tar", options.count)
        TOKENIZERS["vqgan"]().save(work / "tokenizer")
        if start(work, "whole", options, 1).wait() != 0:
            sys.exit("the unbroken run failed")
        killed = run_killed(work, options)
        whole, other = contents(work / "whole"), contents(work / "killed")
        differ = [name for name in whole.keys() | other.keys() if whole.get(name) != other.get(name)]
        names = [int(Path(row.name).stem) for row in read_shards(work / "killed")]  # type: ignore[union-attr]
        expected = [number for number in range(options.count) if number % 100 != 50]
        manifest = json.loads(other["_manifest.json"])
        line = {
            "images": manifest["images"],
            "failures": manifest["failures"],
            "ids": manifest["ids"],
            "shards": len(manifest["shards"]),
            "killed": killed,
            "files": len(whole),
            "differ": sorted(differ),
            "each once": names == expected,
        }
        print(json.dumps(line))
        if differ or names != expected:
            sys.exit(1)


if __name__ == "__main__":
    main()
