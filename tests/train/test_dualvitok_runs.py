"""The published recipes as configurations, and a small run of each kind."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import tokenizers_mm as tmm
from benchmarks.tiny import dualvitok_config as tiny_config
from tests.cases import ROOT
from tokenizers_mm.checkpoints.dualvitok import PUBLISHED, read_config
from tokenizers_mm.config import from_mapping, to_mapping
from tokenizers_mm.data.buckets import BucketConfig
from tokenizers_mm.data.sources import DataConfig, SourceConfig
from tokenizers_mm.losses.discriminators import PatchGANConfig
from tokenizers_mm.models import DualViTokConfig
from tokenizers_mm.models.starting import ModelConfig
from train.config import RunConfig
from train.config import read_config as read_run
from train.log import read_log
from train.loop import run
from train.objectives.reconstruction import NoiseConfig, ReconstructionConfig
from train.objectives.terms import LossConfig
from train.optim import OptimizerConfig


@pytest.mark.parametrize("name", ["dualvitok_fix256", "dualvitok_anyres_max512"])
def test_published_recipes(name: str) -> None:
    run = read_run(str(ROOT / "configs" / f"{name}.yaml"), [])
    config = run.objective
    assert from_mapping(DualViTokConfig, config.model.config) == read_config(PUBLISHED)
    assert config.loss.weights == {
        "pixel": 1.0,
        "perceptual": 1.0,
        "semantic": 1.0,
        "codebook": 1.0,
        "commitment": 0.25,
        "generator": 0.5,
    }
    assert (config.loss.pixel, config.loss.gan, config.loss.gan_start) == ("l2", "hinge", 20000)
    assert (config.optimizer.lr, config.optimizer.betas, config.optimizer.clip) == (1e-4, (0.9, 0.95), 1.0)
    assert run.batch_size * run.accumulate * 8 == 256
    fixed = name.endswith("fix256")
    assert config.noise == (NoiseConfig(0.1, 0.1, "random") if fixed else None)
    assert config.data.image_size == ((256, 256) if fixed else None)
    assert config.data.buckets == (None if fixed else BucketConfig(32**2, 512**2))


def tiny_run(out: Path, data: DataConfig) -> RunConfig:
    weights = {"pixel": 1.0, "semantic": 1.0, "codebook": 1.0, "commitment": 0.25, "generator": 0.5}
    loss = LossConfig(weights, semantic="target", gan_start=1, discriminator=PatchGANConfig(4, 2))
    model = ModelConfig("dualvitok", to_mapping(tiny_config()))
    objective = ReconstructionConfig(model, data=data, loss=loss, noise=NoiseConfig(0.5, 0.5))
    return RunConfig(str(out), objective, steps=3, batch_size=2, log_every=1, save_every=0)


def test_a_run_with_buckets(tmp_path: Path) -> None:
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    for index, (height, width) in enumerate([(64, 130), (130, 64), (100, 100)]):
        noise = np.random.default_rng(index).integers(0, 256, (height, width, 3), dtype=np.uint8)
        Image.fromarray(noise).save(pictures / f"{index}.png")
    folder = (SourceConfig("folder", str(pictures)),)
    state = run(tiny_run(tmp_path / "out", DataConfig(folder, buckets=BucketConfig())))
    lines = read_log(tmp_path / "out" / "log.jsonl")
    assert {"pixel", "semantic", "commitment", "usage_semantic", "usage_pixel"} <= lines[0].keys()
    assert {"generator", "discriminator"} <= lines[-1].keys()
    frozen = [name for name, p in state.averaged.named_parameters() if not p.requires_grad]
    assert all(name.startswith("semantic_encoder.tower.") for name in frozen)
    assert tmm.load(tmp_path / "out" / "tokenizer").encode(torch.zeros(1, 3, 32, 48)).ids.shape == (1, 7)


def test_a_run_of_one_size_with_a_schedule_of_its_own_for_the_discriminator(tmp_path: Path) -> None:
    config = tiny_run(tmp_path / "out", DataConfig((SourceConfig("scenes"),), image_size=(64, 64)))
    own = OptimizerConfig(lr=0.01, betas=(0.5, 0.9), warmup=4)
    state = run(
        dataclasses.replace(config, objective=dataclasses.replace(config.objective, discriminator_optimizer=own))
    )
    assert [line["lr"] for line in read_log(tmp_path / "out" / "log.jsonl")] == [1e-4] * 3
    (group,) = state.optimizers["discriminator"].param_groups
    assert group["lr"] == pytest.approx(0.01 * 2 / 4)  # its second step, of four to warm up
    assert group["betas"] == (0.5, 0.9)


def test_sizes_that_contradict_get_one_sentence(tmp_path: Path) -> None:
    scenes = (SourceConfig("scenes"),)
    for data, message in [
        (DataConfig(scenes), "expected image_size or buckets for a tokenizer of any size, got neither"),
        (DataConfig(scenes, image_size=(60, 64)), "multiples of 16, got 60 x 64"),
        (DataConfig(scenes, image_size=(64, 64), buckets=BucketConfig()), r"no image_size, got \(64, 64\)"),
    ]:
        with pytest.raises(ValueError, match=message):
            run(tiny_run(tmp_path / "out", data))
