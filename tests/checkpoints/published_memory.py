"""One conversion of a published size in a process of its own, and the memory that it took.

    python -m tests.checkpoints.published_memory FAMILY FOLDER

FOLDER holds model.safetensors (`write` makes one). Prints JSON: the peaks in bytes before and after the conversion.
"""

import json
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file

from tests.models.full_size import peak
from tokenizers_mm.checkpoints.convert import convert


def write(keys: Path, file: Path) -> int:
    """A file with these names and shapes; the bytes of its weights. Values do not matter for memory."""
    tensors = {}
    for name, shape in json.loads(keys.read_text()).items():
        counts = name.endswith("num_batches_tracked")
        tensors[name] = torch.zeros(shape, dtype=torch.int64) if counts else torch.full(shape, 0.01)
    save_file(tensors, file)
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())


def main(family: str, folder: str) -> None:
    """Convert the file that the parent process wrote.

    A first module without memory loads parts of torch (about 170 MB), which are no part of a conversion.
    """
    with torch.device("meta"):
        torch.nn.functional.normalize(torch.randn(4, 4) * 0.5, dim=-1).uniform_(-1, 1)
        torch.nn.MultiheadAttention(4, 1)
    before = peak()
    convert(family, Path(folder) / "model.safetensors", Path(folder) / "out")
    print(json.dumps({"before": before, "after": peak()}))


if __name__ == "__main__":
    main(*sys.argv[1:])
