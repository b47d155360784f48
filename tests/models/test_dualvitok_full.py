"""DualViTok at its published size (1.35 billion parameters): minutes and 11 GB of disk, run by `make test-full`.

Tolerances: the cases' README; features 1e-3 (32 layers), ids equal where the original's margin exceeds 5e-3. Memory: at
most 1.25 times the float32 weights, to convert as well as to load and encode.
"""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.cases import ROOT, case

WEIGHTS = 4 * (1_345_978_979 + 4_194_364)
FEATURES, PIXELS, GAP = 1e-3, 1e-3, 5e-3


def run(*arguments: object) -> int:
    """One step in a process of its own; its peak memory in bytes."""
    command = [sys.executable, "-m", "tests.models.dualvitok_full_size", *map(str, arguments)]
    done = subprocess.run(command, cwd=ROOT, check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return int(done.stdout.splitlines()[-1])


@pytest.mark.full
def test_full_size(tmp_path: Path) -> None:
    reference = case("dualvitok/full_size")
    file, directory, result = tmp_path / "model.safetensors", tmp_path / "tokenizer", tmp_path / "result.safetensors"
    run("weights", reference.folder, file)
    peaks = {"convert": run("convert", file, directory)}
    file.unlink()
    peaks["encode"] = run("encode", directory, reference.folder / "inputs.safetensors", result)
    print({name: f"{peak / 1e9:.2f} GB, {peak / WEIGHTS:.3f} of the weights" for name, peak in peaks.items()})

    found, out = load_file(result), reference.outputs
    for image in ("a", "b"):
        for ours, theirs in [("semantic", "h_semantic"), ("pixel", "h_pixel"), ("target", "target_semantic")]:
            expected = out[f"{image}.{theirs}"].permute(0, 2, 3, 1)
            difference = float((found[f"{image}.{ours}"] - expected).abs().max())
            print(image, ours, f"{difference:.1e}")
            assert difference < FEATURES, (image, ours)
        ids = torch.cat([out[f"{image}.{stream}_indices"].flatten(1) for stream in ("semantic", "pixel")], 1)
        gap = torch.cat([out[f"{image}.{stream}_gap"].flatten(1) for stream in ("semantic", "pixel")], 1)
        print(image, "ids that differ:", int((found[f"{image}.ids"] != ids).sum()), "of", ids.numel())
        assert torch.equal(found[f"{image}.ids"][gap > GAP], ids[gap > GAP])
    torch.testing.assert_close(found["b.image"], out["b.recon"], atol=PIXELS, rtol=0)
    decoded = out["b.semantic_decoded"].permute(0, 2, 3, 1).flatten(1, 2)
    torch.testing.assert_close(found["b.decoded"], decoded, atol=FEATURES, rtol=0)
    assert max(peaks.values()) <= 1.25 * WEIGHTS, peaks
