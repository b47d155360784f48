"""One full-size tokenizer in a process of its own: convert, load, encode, decode, and say how much memory it took.

    python -m tests.models.full_size CHECKPOINT DIRECTORY INPUTS OUTPUTS RESULT

INPUTS and OUTPUTS are those of a reference case. RESULT gets what the test compares; the peaks, in bytes, are printed.
"""

import json
import resource
import sys
import time
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

import tokenizers_mm as tmm
from tokenizers_mm.checkpoints.convert import convert
from tokenizers_mm.models import TokenFlow


def peak() -> int:
    """The most memory this process has had resident so far, in bytes.

    Linux tells it in /proc; `getrusage` there starts from what the parent held when it forked.
    """
    status = Path("/proc/self/status")
    if status.is_file():
        return next(1024 * int(line.split()[1]) for line in status.read_text().splitlines() if "VmHWM" in line)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


@torch.no_grad()
def main(checkpoint: str, directory: str, inputs: str, outputs: str, result: str) -> None:
    """All steps, in the order a user would take."""
    report = {"start": peak()}
    started = time.perf_counter()
    convert("tokenflow", checkpoint, directory)
    report["convert"], report["convert_s"] = peak(), round(time.perf_counter() - started, 1)  # type: ignore[assignment]
    tokenizer = tmm.load(directory)
    report["load"] = peak()
    image, expected = load_file(inputs)["image"], load_file(outputs)["indices"]
    started = time.perf_counter()
    codes = tokenizer.encode(image)
    report["encode"], report["encode_s"] = peak(), round(time.perf_counter() - started, 1)  # type: ignore[assignment]
    started = time.perf_counter()
    decoded = tokenizer.decode_ids(expected)
    report["decode"], report["decode_s"] = peak(), round(time.perf_counter() - started, 1)  # type: ignore[assignment]
    assert isinstance(tokenizer, TokenFlow)
    semantic = tokenizer.decode_semantic(tokenizer.quantizer.look_up(expected))
    tensors = {"ids": codes.ids, "image": decoded, "semantic": semantic, "features": tokenizer.encode_features(image)}
    tensors["tokens"] = tokenizer.semantic_encoder(image).flatten(1, 2)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, result)
    print(json.dumps(report))


if __name__ == "__main__":
    main(*sys.argv[1:])
