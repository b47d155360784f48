"""Every configuration of a language model trains at a tiny size; features of each family train a projector."""

from pathlib import Path
from typing import Any

import pytest
import torch

from tests import mar_cases
from tests.cases import ROOT
from tests.language_data import DEBUG, TINY, arguments, make_folder, train
from tests.models import test_dualvitok, test_tokenflow
from tokenizers_mm.config import read_yaml
from tokenizers_mm.llm import FeatureProjector
from tokenizers_mm.models import MAR, DualViTok, ImageTokenizer, TokenFlow
from train.__main__ import main

CONFIGS = sorted(path.name for path in (ROOT / "configs").glob("language_*.yaml"))
SIDES = {"tokenflow": 32, "dualvitok": 64, "mar": 32}


def build(family: str) -> ImageTokenizer[Any]:
    torch.manual_seed(0)
    if family == "tokenflow":
        return TokenFlow.from_config(test_tokenflow.tiny_config()).eval()
    if family == "dualvitok":
        return DualViTok.from_config(test_dualvitok.tiny_config()).eval()
    return MAR.from_config(mar_cases.tiny_config()).eval()


@pytest.fixture(scope="module")
def folders(one_thread: None, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {name: make_folder(tmp_path_factory.mktemp(name), build(name), side) for name, side in SIDES.items()}


@pytest.mark.parametrize("name", CONFIGS)
def test_it_trains(name: str, folders: dict[str, Path], tmp_path: Path) -> None:
    """Only sizes, paths and the text tokenizer's mask token are other than in the file."""
    path = str(ROOT / "configs" / name)
    data = read_yaml(path)["objective"]
    if data.get("learns") == "lora":
        pytest.importorskip("peft")
    small = {"steps": 12, "batch_size": 4, "accumulate": 1, "log_every": 4, "optimizer.warmup": 0, "optimizer.lr": 1e-2}
    options: dict[str, Any] = {**small, "precision": "fp32"}
    options |= {"language_model.source": "''", "language_model.kind": "llama", "language_model.config": TINY}
    options["language_model.text_tokenizer"] = folders["tokenflow"] / "text"
    options |= {"pack": 120} if data.get("pack") else {}
    options |= {"mask_token": "<mask>"} if data.get("mask_token") else {}
    records = "features" if data.get("projector", "none") != "none" else "ids"
    log = train(folders["tokenflow"], tmp_path, records, config=path, **options)
    assert log[-1]["loss"] < 0.95 * log[0]["loss"]


@pytest.mark.parametrize("family", ["tokenflow", "mar"])
def test_features_train_a_projector(family: str, folders: dict[str, Path], tmp_path: Path) -> None:
    train_projector(folders[family], tmp_path, "tokenizer", 1)


def test_two_streams_train_a_projector_each(folders: dict[str, Path], tmp_path: Path) -> None:
    train_projector(folders["dualvitok"], tmp_path, "streams", 2)


def train_projector(folder: Path, out: Path, features: str, parts: int) -> None:
    sizes = {"language_model.sizes": "[[64, 64]]"} if parts == 2 else {}
    log = train(folder, out, "features", projector="gelu", features=features, steps=30, log_every=5, **sizes)
    assert log[-1]["loss"] < 0.7 * log[0]["loss"]
    projector = FeatureProjector.load(out)
    assert len(projector.config.dims) == parts
    image = tuple(torch.ones(2, dim) for dim in projector.config.dims)
    assert projector([image]).shape == (2 * parts, projector.config.width)


def test_projectors_of_another_shape_get_one_sentence(folders: dict[str, Path], tmp_path: Path) -> None:
    train(folders["tokenflow"], tmp_path, "features", projector="silu", steps=1, save_every=0)
    assert not (tmp_path / "checkpoints").exists()
    (tmp_path / "projector.json").write_text('{"dims": [3], "width": 4, "activation": "silu"}')
    with pytest.raises(ValueError, match=r"projector.safetensors: expected exactly the tensors of the model, got 4 of"):
        FeatureProjector.load(tmp_path)
    (tmp_path / "projector.json").unlink()
    with pytest.raises(ValueError, match=r"projector.json: expected a projector.json, got no such file"):
        FeatureProjector.load(tmp_path)


def test_images_as_ids_of_a_continuous_tokenizer_get_one_sentence(
    folders: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments(folders["mar"], tmp_path, "ids", config=DEBUG)) == 2
    assert "image: expected a Segment with as_features=True (this tokenizer is continuous)" in capsys.readouterr().err
