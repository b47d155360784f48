"""The library on a CUDA device against itself on the CPU: tokenizers, quantizers, k-means, steps of every objective."""

import copy
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState

from benchmarks.tiny import TOKENIZERS, images
from tests.quantizers.kinds import DIM, MAKERS
from tests.train.kinds import KINDS, make_place, tiny, without_dropout
from tokenizers_mm import kernels
from tokenizers_mm.models.tokenflow_start import start_from_images
from train.state import build_state
from train.step import train_step

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]


@pytest.fixture(autouse=True)
def exact_products(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    AcceleratorState._reset_state(True)
    yield
    AcceleratorState._reset_state(True)


@pytest.mark.parametrize("name", TOKENIZERS)
def test_tokenizers(name: str) -> None:
    """Most ids of the float32 passes, all stable ids, and pixels."""
    here = TOKENIZERS[name]()
    there = copy.deepcopy(here).cuda()
    x = images(here.image_size, 6)
    codes, found = here.encode(x), there.encode(x.cuda())
    assert float((codes.ids == found.ids.cpu()).double().mean()) >= 0.98
    stable, stable_there = here.encode(x, stable=True), there.encode(x.cuda(), stable=True)
    assert torch.equal(stable.ids, stable_there.ids.cpu())
    if name != "semantic":  # without pixels
        moved = there.decode(codes.to("cuda"))
        assert float((here.decode(codes) - moved.cpu()).detach().abs().max()) < 2e-3


@pytest.mark.parametrize("name", MAKERS)
def test_quantizers(name: str) -> None:
    """Vectors, terms and gradients in training mode."""
    torch.manual_seed(0)
    here, z = MAKERS[name]().train(), torch.randn(3, 2, 2, DIM)
    there = copy.deepcopy(here).cuda()
    gathered = []
    for quantizer, features in ((here, z.clone()), (there, z.clone().cuda())):
        features = features.detach().requires_grad_()
        torch.manual_seed(0)
        found = quantizer.quantize(features)
        loss = found.vectors.square().sum() + sum((found.terms or {}).values(), torch.zeros((), device=features.device))
        loss.backward()
        assert features.grad is not None
        gathered.append((found.ids.cpu(), found.vectors.detach().cpu(), loss.detach().cpu(), features.grad.cpu()))
    for a, b in zip(*gathered, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_k_means() -> None:
    z = torch.randn(5000, 8, generator=torch.Generator().manual_seed(0))
    here = kernels.kmeans(z, 100, init=z[:100].clone(), iterations=5)
    there = kernels.kmeans(z.cuda(), 100, init=z[:100].cuda(), iterations=5)
    torch.testing.assert_close(there.codebook.cpu(), here.codebook, rtol=1e-4, atol=1e-5)


def test_a_start_from_images() -> None:
    """Signs and order of principal components are free where variances are equal: only the images count."""
    made = []
    for device in ("cpu", "cuda"):
        tokenizer: Any = copy.deepcopy(TOKENIZERS["demo-64"]()).to(device)
        x = images(tokenizer.image_size, 48)
        start_from_images(tokenizer, x, 0, 3, 1e-3)
        again = tokenizer(x.to(device)).image.detach().cpu()
        made.append(float((again - x).square().mean()))
    assert made[1] == pytest.approx(made[0], rel=0.1)


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("kind", KINDS)
def test_training(kind: str, precision: str, tmp_path: Path) -> None:
    """Losses of four steps without dropout: that of the CPU in the first one, finite in all; float16 may skip steps."""
    place = make_place(tmp_path)
    losses: dict[str, list[float]] = {}
    for device in ("cpu", "cuda"):
        AcceleratorState._reset_state(True)
        edits = {"device": device, "precision": precision if device == "cuda" else "fp32", "non_finite": "skip"}
        config = tiny(kind, place, tmp_path / device, without_dropout(kind) | edits)
        if kind == "joint" and edits["precision"] == "fp16":
            with pytest.raises(ValueError, match="precision: expected fp32 or bf16 for joint tuning"):
                build_state(config)
            return
        state = build_state(config)
        state.objective.begin(state.whole(), 0, 0)
        batches = state.objective.batches(0, 0)
        reports = [train_step(state, [next(batches)])[0] for _ in range(4)]
        losses[device] = [report["loss"] for report in reports]
        assert all(math.isfinite(value) for value in losses[device])
    assert losses["cuda"][0] == pytest.approx(losses["cpu"][0], rel=2e-3 if precision == "fp32" else 5e-2)
