"""Every file in configs/ trains with the one command: two steps, with small networks and local data."""

from pathlib import Path
from typing import Any

import pytest
import yaml
from accelerate.state import AcceleratorState

from tests.cases import ROOT
from tests.language_data import TINY
from tests.models import test_dualvitok
from tests.train.kinds import edited, make_place
from tests.train.test_tokenflow_configs import reduced_model
from tokenizers_mm.config import from_mapping, to_mapping
from tokenizers_mm.models import TokenFlow, TokenFlowConfig
from train.__main__ import main
from train.log import read_log

pytestmark = pytest.mark.usefixtures("one_thread")
CONFIGS = sorted((ROOT / "configs").glob("*.yaml"))
MAR_SIZES = {"width": 32, "depth": 1, "heads": 2, "grid": [4, 4]}


@pytest.fixture(scope="module")
def place(one_thread: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tokenizer, a text tokenizer, records, and images with captions."""
    place = make_place(tmp_path_factory.mktemp("place"))
    for index in range(6):
        (place / f"{index}.txt").write_text("a red circle")
    return place


def small(path: Path, place: Path) -> dict[str, Any]:
    """The configuration with its own recipe, but small networks, local data and no perceptual weights."""
    data = yaml.safe_load(path.read_text())
    objective = data["objective"]
    edits: dict[str, Any] = {"batch_size": 2, "save_every": 0, "log_every": 1, "device": "cpu", "precision": "fp32"}
    edits |= {"accumulate": min(2, data.get("accumulate", 1)), "sample_every": 0, "max_seconds": 0}
    edits |= {} if objective["kind"] == "joint" else {"steps": 2}
    for index, source in enumerate(objective.get("data", {}).get("sources", [])):
        if source["kind"] == "folder":
            objective["data"]["sources"][index]["path"] = str(place)
    if "data" in objective:
        edits["objective.data.workers"] = 0
    if "loss" in objective:
        edits |= {"objective.loss.weights.perceptual": 0.0}
        if objective["loss"]["weights"].get("generator"):
            edits |= {"objective.loss.gan_start": 1, "objective.loss.discriminator.channels": 8}
    return edited(data, edits | {
        "reconstruction": small_reconstruction, "mar": small_mar, "language": small_language, "joint": small_joint,
    }[objective["kind"]](objective, place))  # fmt: skip


def small_reconstruction(objective: dict[str, Any], place: Path) -> dict[str, Any]:
    model = objective["model"]
    if model["family"] == "vqgan":
        return small_vqgan(model["config"])
    if model["family"] == "dualvitok":
        edits: dict[str, Any] = {"objective.model.config": to_mapping(test_dualvitok.tiny_config())}
        if "buckets" in objective["data"]:
            return edits | {"objective.data.buckets": {"min_pixels": 1024, "max_pixels": 4096, "cell": 16, "step": 32}}
        return edits | {"objective.data.image_size": [64, 64]}
    if model["family"] == "semantic":
        return small_semantic(objective)
    if objective["loss"].get("teacher", {}).get("package"):  # published weights of an optional package
        (side, _), (rows, _) = model["config"]["image_size"], model["config"]["semantic_decoder"]["grid"]
        tower = {"img_size": side, "patch_size": side // rows, "embed_dim": 48, "depth": 1, "num_heads": 2}
        model["config"]["semantic_decoder"]["out_dim"] = 48
        objective["warm_start"]["images"] = 8
        objective["loss"]["teacher"] = {"name": "vit_tiny_patch16_224", "options": tower, "pretrained": False}
    if model["config"]["quantizer"]["codebook_size"] == 32768:  # a released model
        if "start_from" in model:
            source = yaml.safe_load((ROOT / "configs" / "tokenflow_clipb_224.yaml").read_text())["objective"]
            reduced_model(source)
            config = from_mapping(TokenFlowConfig, source["model"]["config"])
            TokenFlow.from_config(config).save(place / "clipb_224")
            model["start_from"] = str(place / "clipb_224")
        reduced_model(objective)
    return {}


def small_semantic(objective: dict[str, Any]) -> dict[str, Any]:
    config, part = objective["model"]["config"], "objective.model.config"
    tower: dict[str, Any] = {"img_size": 32, "patch_size": 16, "embed_dim": 24, "depth": 1, "num_heads": 2}
    tower = {"name": "vit_tiny_patch16_224", "options": tower, "pretrained": False}
    if config["tower"].get("kind") == "transformers":
        tower = {"hidden_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 28}
        tower = {"options": {**config["tower"]["options"], **tower}, "pretrained": ""}
    side = 2 * config["cell"]
    edits: dict[str, Any] = {
        f"{part}.image_size": [side, side],
        f"{part}.tower": {**config["tower"], **tower},
        f"{part}.quantizer": {**config["quantizer"], "codebook_size": 16, "dim": 8 if config.get("head", True) else 24},
    }
    if "warm_start" in objective:
        edits["objective.warm_start.images"] = 8
    if "semantic_decoder" in config:
        edits[f"{part}.semantic_decoder"] = {**config["semantic_decoder"], "width": 32, "depth": 1, "heads": 2}
    if "pixel_decoder" in config:
        edits[f"{part}.pixel_decoder"] = {**config["pixel_decoder"], "in_channels": 8, "channels": 8, "num_groups": 4}
    return edits


def small_mar(objective: dict[str, Any], place: Path) -> dict[str, Any]:
    pixel = {"channels": 16, "multipliers": [1], "num_blocks": 1, "attention_levels": [], "num_groups": 8}
    return {
        "objective.data.image_size": [32, 32],
        "objective.model.autoencoder.encoder": {"out_channels": 32, "stem_patch": 8, **pixel},
        "objective.model.autoencoder.decoder": {"in_channels": 16, "head_patch": 8, **pixel},
        **{f"objective.model.encoder.{name}": value for name, value in MAR_SIZES.items()},
        **{f"objective.model.decoder.{name}": value for name, value in MAR_SIZES.items()},
        "objective.model.decoder.encoder_width": 32,
        "objective.model.denoiser": {"token_dim": 16, "condition_dim": 32, "width": 32, "depth": 1},
        "objective.autoencoder.kl16": "",
        "objective.autoencoder.steps": min(1, objective["autoencoder"]["steps"]),
        "objective.scenes": 0,
    }


def small_language(objective: dict[str, Any], place: Path) -> dict[str, Any]:
    return {
        "objective.tokenizer": str(place / "tokenizer"),
        "objective.language_model": {"kind": "llama", "config": TINY, "text_tokenizer": str(place / "text")},
        "objective.records": [
            {"path": str(place / ("ids" if objective.get("projector", "none") == "none" else "records")) + ".jsonl"}
        ],
        **({"objective.mask_token": "<mask>"} if objective.get("mask_token") else {}),
        **({"objective.pack": 160} if objective.get("pack") else {}),
    }


def small_joint(objective: dict[str, Any], place: Path) -> dict[str, Any]:
    for stage in objective["stages"]:
        stage["steps"] = 2
        if "records" in stage:
            stage["records"] = [{"path": str(place / "records.jsonl")}]
    edits = {
        "objective.tokenizer": str(place / "tokenizer"),
        "objective.language_model": {"kind": "llama", "config": TINY, "text_tokenizer": str(place / "text")},
        "objective.loss.weights.entropy": 0.0,
        "objective.guard": {**objective["guard"], "folder": "", "pictures": 2, "inception": ""},
    }
    if "teacher" in objective["loss"]:
        tower = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 1, "num_heads": 2}
        name = objective["loss"]["teacher"]["name"].partition(".")[0]
        edits["objective.loss.teacher"] = {"name": name, "options": {**tower, "num_classes": 0}, "pretrained": False}
    return edits


def small_vqgan(config: dict[str, Any]) -> dict[str, Any]:
    pixel = {"channels": 16, "multipliers": [1, 1], "num_blocks": 1, "attention_levels": [], "num_groups": 8}
    channels = 16 if config.get("kernel", 1) else config["quantizer"]["dim"]
    edits: dict[str, Any] = {
        "objective.data.image_size": [32, 32],
        "objective.model.config.encoder": {"out_channels": channels, "stem_patch": 4, **pixel},
        "objective.model.config.decoder": {"in_channels": channels, "head_patch": 4, **pixel},
    }
    return edits | ({"objective.model.config.scales": [[1, 1], [2, 2], [4, 4]]} if "scales" in config else {})


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_it_trains(path: Path, place: Path, tmp_path: Path) -> None:
    data = small(path, place)
    if data["objective"].get("learns") == "lora":
        pytest.importorskip("peft")
    file = tmp_path / "run.yaml"
    file.write_text(yaml.safe_dump(data | {"out": str(tmp_path / "run")}))
    assert main([str(file)]) == 0
    AcceleratorState._reset_state(True)
    lines = [line for line in read_log(tmp_path / "run" / "log.jsonl") if "loss" in line]
    stages = len(data["objective"].get("stages", []))
    assert [line["step"] for line in lines] == list(range(1, 1 + (2 * stages or 2)))
    assert (tmp_path / "run" / ("config.json" if data["objective"]["kind"] == "language" else "tokenizer")).exists()
