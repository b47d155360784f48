"""The multi-scale quantizer makes what depends on the codes alone once per call, and is what its definition says."""

from typing import Any

import pytest
import torch
from torch import Tensor

from tokenizers_mm import kernels
from tokenizers_mm.functional.multiscale import area_down, bicubic_up
from tokenizers_mm.kernels import _ops
from tokenizers_mm.quantizers.multiscale import MultiScaleQuantizer
from tokenizers_mm.quantizers.shared_index import SharedIndexConfig, SharedIndexQuantizer

GRIDS = [(1, 1), (2, 3), (4, 4)]
LENGTH = 1 + 6 + 16


def build(normalize: bool = True) -> tuple[SharedIndexQuantizer, MultiScaleQuantizer, Tensor]:
    torch.manual_seed(0)
    inner = SharedIndexQuantizer(SharedIndexConfig(64, (6, 3), (1.5, 1.0), normalize, entropy_temperature=0.1))
    return inner, MultiScaleQuantizer(inner, GRIDS), torch.randn(2, 4, 4, 9, requires_grad=True)


@pytest.mark.parametrize("normalize", [True, False])
def test_the_same_as_scale_by_scale(normalize: bool) -> None:
    inner, quantizer, z = build(normalize)
    gradients = []
    for once in (True, False):
        z.grad = None
        quantizer.zero_grad()
        if once:
            found = quantizer.quantize(z)
            vectors, terms, ids = found.vectors, [found.terms], found.ids
        else:
            vectors, residual, terms, parts = torch.zeros_like(z), z, [], []
            for grid in GRIDS:
                part = inner.quantize(area_down(residual, grid))
                up = bicubic_up(part.vectors, (4, 4))
                vectors, residual = vectors + up, residual - up.detach()
                terms.append(part.terms)
                parts.append(part.ids.flatten(1))
            assert torch.equal(torch.cat(parts, 1), ids)
        loss = vectors.square().sum()
        for term in terms:
            assert term is not None
            loss = loss + sum(term.values()) / len(terms)
        loss.backward()
        assert z.grad is not None
        gradients.append([loss.detach(), z.grad, *[p.grad.clone() for p in inner.codebooks]])
    # Gradients of one codebook are added before its norms are differentiated and not after: float32 rounding.
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(quantizer.look_up(ids), vectors.detach(), rtol=1e-5, atol=1e-6)


def test_the_codes_are_made_ready_once(monkeypatch: pytest.MonkeyPatch) -> None:
    inner, quantizer, z = build()
    calls: list[Any] = []
    original = inner.codebook
    monkeypatch.setattr(inner, "codebook", lambda: calls.append(None) or original())
    ids = quantizer.quantize(z).ids
    assert len(calls) == 1
    quantizer.look_up(ids)
    assert len(calls) == 2


@pytest.mark.skipif(kernels.describe()["library"] == "", reason="the native library is not there")
def test_the_codes_are_packed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    _, quantizer, z = build()
    made: list[Any] = []
    original = _ops.PackedCodebook
    monkeypatch.setattr(_ops, "PackedCodebook", lambda *given, **named: made.append(None) or original(*given, **named))
    kernels.invalidate()
    with kernels.use_kernels("native"):
        for _ in range(3):  # the codes are computed anew by every call, but they are the same
            assert quantizer.quantize(z).ids.shape == (2, LENGTH)
            assert len(made) == 1


@pytest.mark.parametrize("length", [0, 2, LENGTH - 1, LENGTH + 1])
def test_part_of_a_scale_is_refused(length: int) -> None:
    _, quantizer, _ = build()
    with pytest.raises(ValueError, match="ids: expected a whole number of scales, got"):
        quantizer.look_up(torch.zeros(2, length, dtype=torch.int64))
    assert quantizer.look_up(torch.zeros(2, 1 + 6, dtype=torch.int64)).shape == (2, 4, 4, 9)
