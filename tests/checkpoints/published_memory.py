"""One conversion of a published size in a process of its own, and the memory that it took.

    python -m tests.checkpoints.published_memory FAMILY FOLDER [OPTION=FILE ...]

FOLDER is a download that `write` made beside it. Prints JSON: the peaks in bytes before and after the conversion.
"""

import json
import math
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from tests.cases import case
from tests.models.full_size import peak
from tokenizers_mm._safetensors import DTYPES, file_start
from tokenizers_mm.checkpoints.convert import convert

Spec = tuple[torch.dtype, list[int]]


def keys_of(name: str) -> dict[str, Spec]:
    """The tensors of a key list, by name: {name: shape} of float32 weights, or one such mapping for each dtype."""
    found = json.loads((case("published").folder / f"{name}_keys.json").read_text())
    if not isinstance(next(iter(found.values())), dict):
        counts = {key: found.pop(key) for key in list(found) if key.endswith("num_batches_tracked")}
        found = {"F32": found, "I64": counts}
    kinds = {text: dtype for dtype, text in DTYPES.items()}
    return {key: (kinds[kind], shape) for kind, shapes in found.items() for key, shape in shapes.items()}


def empty(keys: Mapping[str, Spec]) -> dict[str, torch.Tensor]:
    """Tensors without values: on the device of the context, on a CPU without memory until they are written."""
    return {name: torch.empty(shape, dtype=dtype) for name, (dtype, shape) in keys.items()}


def size_of(keys: Mapping[str, Spec]) -> int:
    """Bytes of the weights."""
    return sum(math.prod(shape) * dtype.itemsize for dtype, shape in keys.values())


def write(keys: Mapping[str, Spec], file: Path, shards: int = 1) -> None:
    """A checkpoint with these names and shapes, and the index of one in several files.

    Its values are zeros that take no room on a disk; in memory they take what any others would.
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    if file.suffix != ".safetensors":
        with torch.serialization.skip_data():
            torch.save({"state_dict": empty(keys)} if file.suffix == ".ckpt" else empty(keys), file)
    elif shards == 1:
        write_safetensors(keys, file)
    else:
        places, before, total = {}, 0, size_of(keys)
        for name, spec in keys.items():
            places[name] = f"{file.stem}-{1 + before * shards // total:05}-of-{shards:05}.safetensors"
            before += size_of({name: spec})
        for place in set(places.values()):
            write_safetensors({name: keys[name] for name in keys if places[name] == place}, file.with_name(place))
        index = {"metadata": {"total_size": total}, "weight_map": places}
        file.with_name(f"{file.name}.index.json").write_text(json.dumps(index))


def write_safetensors(keys: Mapping[str, Spec], file: Path) -> None:
    """A header, and a hole in the place of the numbers."""
    ordered = dict(sorted(keys.items(), key=lambda item: -item[1][0].itemsize))
    start = file_start(ordered)
    with open(file, "wb") as stream:
        stream.write(start)
        stream.truncate(len(start) + size_of(keys))


def main(family: str, folder: str, *options: str) -> None:
    """Convert what the parent process wrote.

    A first module without memory loads parts of torch (about 170 MB), which are no part of a conversion.
    """
    with torch.device("meta"):
        torch.nn.functional.normalize(torch.randn(4, 4) * 0.5, dim=-1).uniform_(-1, 1)
        torch.nn.MultiheadAttention(4, 1)
    before = peak()
    found: dict[str, Any] = dict(item.split("=", 1) for item in options)
    convert(family, folder, Path(folder).with_name("out"), **found)
    print(json.dumps({"before": before, "after": peak()}))


if __name__ == "__main__":
    main(*sys.argv[1:])
