"""rFID: an error without weights, and torch-fidelity driven in memory with a small extractor against the formula."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy.linalg import sqrtm

from tokenizers_mm.eval.base import Batch, Setup
from tokenizers_mm.eval.networks import RFID
from tokenizers_mm.eval.protocols import PROTOCOLS


def rfid(weights: Path) -> RFID:
    return RFID(Setup(PROTOCOLS["default"], {"inception": str(weights)}))


def test_missing_weights_are_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="rfid weights: expected the Inception weights"):
        rfid(tmp_path / "no.pth")


class Harm:
    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.marker,)


def test_weights_that_would_run_code_are_refused(tmp_path: Path) -> None:
    file = tmp_path / "inception.pth"
    torch.save({"weight": Harm(tmp_path / "harm")}, file)
    with pytest.raises(ValueError, match=r"rfid weights: expected a file of torch\.save with nothing but weights"):
        rfid(file)
    file.write_text("text")
    with pytest.raises(ValueError, match="rfid weights: expected a file"):
        rfid(file)
    assert not (tmp_path / "harm").exists()


@pytest.mark.filterwarnings("ignore")
def test_frechet_distance_equals_the_formula() -> None:
    fidelity = pytest.importorskip("torch_fidelity")
    from torch_fidelity.feature_extractor_base import FeatureExtractorBase

    class Mean(FeatureExtractorBase):
        def __init__(self, name, features_list, **_):
            super().__init__(name, features_list)

        @staticmethod
        def get_provided_features_list():
            return ("4",)

        @staticmethod
        def get_default_feature_layer_for_metric(metric):
            return "4"

        @staticmethod
        def can_be_compiled():
            return True

        @staticmethod
        def get_dummy_input_for_compile():
            return torch.zeros(1, 3, 8, 8, dtype=torch.uint8)

        def forward(self, x):
            x = x.float()
            return (torch.cat([x.mean((2, 3)), x.std((2, 3))[:, :1]], 1),)

    fidelity.register_feature_extractor("mean-of-colours", Mean)
    generator = torch.Generator().manual_seed(0)
    a = [torch.rand(3, 8, 8, generator=generator) * 2 - 1 for _ in range(40)]
    b = [torch.rand(3, 8, 8, generator=generator) * 1.5 - 1 for _ in range(40)]
    metric = RFID(Setup(PROTOCOLS["default"], extractor="mean-of-colours"))
    for start in range(0, 40, 8):
        metric.update(Batch(torch.stack(a[start : start + 8]), torch.stack(b[start : start + 8])))
    value = metric.result()["mean"]

    def moments(images):
        x = torch.stack(images).mul(127.5).add(128).clamp(0, 255).to(torch.uint8).float()
        features = torch.cat([x.mean((2, 3)), x.std((2, 3))[:, :1]], 1).double().numpy()
        return features.mean(0), np.cov(features, rowvar=False)

    (m1, c1), (m2, c2) = moments(a), moments(b)
    expected = ((m1 - m2) ** 2).sum() + np.trace(c1 + c2 - 2 * np.real(sqrtm(c1 @ c2)))
    assert value == pytest.approx(expected, rel=1e-6)
