"""Layout of safetensors files, for those that are written value by value and never stand in memory whole.

A file is the length of a JSON header, the header, and the values. Source: the format of the package safetensors.
"""

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from tokenizers_mm._check import require

DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.bool: "BOOL",
    torch.uint64: "U64",
    torch.uint32: "U32",
    torch.uint16: "U16",
    torch.uint8: "U8",
}
"""Names of dtypes in a safetensors file."""


def file_start(
    entries: Mapping[str, tuple[torch.dtype, Sequence[int]]], metadata: Mapping[str, str] | None = None
) -> bytes:
    """Bytes before the values, which follow in the order of the entries: dtype and shape by name.

    metadata: texts beside the tensors. Wide dtypes go first, so that all values are aligned.

    Raises: ValueError for a dtype that the format does not have.
    """
    header: dict[str, Any] = {} if metadata is None else {"__metadata__": dict(metadata)}
    end = 0
    for name, (dtype, shape) in entries.items():
        require(dtype in DTYPES, name, "numbers that a safetensors file can hold", str(dtype))
        begin, end = end, end + math.prod(shape) * dtype.itemsize
        header[name] = {"dtype": DTYPES[dtype], "shape": list(shape), "data_offsets": [begin, end]}
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text
