"""Codes that are written without a trace: ids follow what is in memory now, in every quantizer and every scale."""

import copy
import ctypes
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from tokenizers_mm import kernels
from tokenizers_mm import quantizers as q
from tokenizers_mm.kernels import _native

CODES, DIM = 1024, 4
"""Enough codes for a pack with copies of them, and so few dimensions that it is a tree."""

CONFIGS = {
    "vq": q.VQConfig(CODES, DIM),
    "vq, unit": q.VQConfig(CODES, DIM, "unit"),
    "vq, cosine": q.VQConfig(CODES, DIM, "cosine"),
    "simvq": q.SimVQConfig(CODES, DIM, bias=True),
    "fvq": q.FVQConfig(CODES, DIM, group=4, width=8, depth=1, heads=2),
    "ibq": q.IBQConfig(CODES, DIM),
    "shared index": q.SharedIndexConfig(CODES, (3, 1)),
    "shared index, as they are": q.SharedIndexConfig(CODES, (3, 1), normalize=False),
    "residual": q.ResidualConfig(q.VQConfig(CODES, DIM), 2),
    "multi-codebook": q.MultiCodebookConfig(q.VQConfig(CODES, DIM // 2), 2),
}


def write_data(tensor: Tensor, new: Tensor) -> None:
    tensor.data.copy_(new)


def write_numpy(tensor: Tensor, new: Tensor) -> None:
    tensor.detach().numpy()[...] = new.numpy()


def write_pointer(tensor: Tensor, new: Tensor) -> None:
    ctypes.memmove(tensor.data_ptr(), new.data_ptr(), new.numel() * new.element_size())


def write_inference_mode(tensor: Tensor, new: Tensor) -> None:
    with torch.inference_mode():
        tensor.copy_(new)


def write_without_version(tensor: Tensor, new: Tensor) -> None:
    with torch.no_grad(), torch.autograd._unsafe_preserve_version_counter(tensor):  # type: ignore
        tensor.copy_(new)


def exchange(tensor: Tensor, new: Tensor) -> None:
    tensor.data = new.clone()


WRITERS = (write_data, write_numpy, write_pointer, write_inference_mode, write_without_version, exchange)


def test_every_quantizer_with_a_codebook_is_walked() -> None:
    kinds = {config.kind for config in CONFIGS.values()} | {"lfq", "bsq", "fsq", "per_dimension"}
    assert kinds == set(q.QUANTIZERS)


@pytest.mark.skipif(_native.cpu_or_none() is None, reason="packs are of the native library")
@pytest.mark.parametrize("scales", [False, True], ids=["plain", "scales"])
@pytest.mark.parametrize("name", CONFIGS)
def test_ids_follow_codes_that_are_written_without_a_trace(name: str, scales: bool) -> None:
    """A few rows and many, since these are searched by different methods."""
    torch.manual_seed(0)
    made: Any = q.build_quantizer(CONFIGS[name])
    made = (q.MultiScaleQuantizer(made, [(1, 1), (2, 2), (8, 8)], q.ScalesConfig()) if scales else made).eval()
    inputs = [torch.randn(batch, 8, 8, DIM) * 0.5 for batch in (1, 3)]
    for writer in WRITERS:
        writer_checked(made, writer, inputs)


@torch.no_grad()
def writer_checked(made: Any, writer: Callable[[Tensor, Tensor], None], inputs: list[Tensor]) -> None:
    for z in inputs:
        made.quantize(z)
        made.quantize(z)
    for tensor in (*made.parameters(), *made.buffers()):
        writer(tensor, torch.randn(tensor.shape) * 0.5)
    fresh = copy.deepcopy(made)
    for z in inputs:
        with kernels.use_kernels("reference"):
            expected = fresh.quantize(z).ids
        assert torch.equal(made.quantize(z).ids, expected), writer.__name__
        assert torch.equal(made.look_up(expected), fresh.look_up(expected)), writer.__name__
