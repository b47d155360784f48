"""Training of tokenizers: terms, freezing, precision, and that nothing in a configuration is silently without effect.

Resume, kills, ranks and accumulation are in test_every_objective.py.
"""

from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState

import tokenizers_mm as tmm
import train.objectives.reconstruction
from benchmarks.tiny import dualvitok_config
from tests.cases import ROOT
from tests.mar_cases import tiny_config as mar_config
from tests.train.kinds import plain
from tokenizers_mm.config import to_mapping
from tokenizers_mm.data.sources import Batch
from tokenizers_mm.eval.towers import OwnTower, open_tower
from train.__main__ import main
from train.checkpoint import list_checkpoints
from train.config import parse_config, read_config
from train.log import read_log
from train.loop import run
from train.state import State, build_state
from train.step import train_step

pytestmark = pytest.mark.usefixtures("one_thread")
DEBUG = str(ROOT / "configs" / "debug.yaml")
TOWER = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 1, "num_heads": 3}
TEACHER = {"name": "vit_tiny_patch16_224", "pretrained": False, "options": TOWER}


def tiny(out: Path, edits: dict[str, Any] | None = None) -> dict[str, Any]:
    return plain("reconstruction", Path(), out, edits)


def steps(data: dict[str, Any], count: int) -> tuple[State, list[dict[str, float]]]:
    """A state after so many steps, and the reports."""
    state = build_state(parse_config(data), Accelerator(cpu=True))
    batches = state.objective.batches(0, 0)
    reports = []
    for _ in range(count):
        reports.append(train_step(state, [next(batches) for _ in range(state.config.accumulate)])[0])
    return state, reports


def test_the_debug_run_leaves_what_it_should(tmp_path: Path) -> None:
    run(read_config(DEBUG, [f"out={tmp_path}", "objective.data.workers=0"]))
    lines = read_log(tmp_path / "log.jsonl")
    assert [line["step"] for line in lines] == [5, 10, 15, 20]
    expected = {"pixel", "semantic", "codebook", "commitment", "entropy", "loss", "psnr", "lr", "usage_shared"}
    assert expected | {"data_wait", "grad_norm"} <= lines[0].keys()
    assert {"generator", "discriminator"} <= lines[-1].keys() - lines[0].keys()
    assert lines[-1]["pixel"] < lines[0]["pixel"]
    assert sum(line.get("revived", 0) for line in lines) > 0
    assert [step for step, _ in list_checkpoints(tmp_path)] == [10, 20]
    assert {p.name for p in (tmp_path / "samples").iterdir()} == {"step_000000010.png", "step_000000020.png"}
    assert list((tmp_path / "trackers").rglob("events.out.tfevents.*"))
    assert tmm.load(tmp_path / "tokenizer").encode(torch.zeros(1, 3, 32, 32)).ids.shape == (1, 21)


def test_the_average_is_saved_and_is_not_the_last_weights(tmp_path: Path) -> None:
    state = run(parse_config(tiny(tmp_path, {"steps": 2})))
    saved = tmm.load(tmp_path / "tokenizer").state_dict()
    assert all(torch.equal(tensor, saved[name]) for name, tensor in state.averaged.state_dict().items())
    last = state.objective.networks["tokenizer"].state_dict()
    assert any(not torch.equal(tensor, saved[name]) for name, tensor in last.items())
    tower = open_tower(str(tmp_path / "captions"))
    assert isinstance(tower, OwnTower)
    for name, tensor in state.objective.networks["captions"].state_dict().items():
        assert torch.equal(tensor, tower.contrast.state_dict()[name]), name


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("objective.optimiser.lr=1", "config.objective.optimiser: unknown key; did you mean 'optimizer'"),
        ("objective.optimizer.lrr=1", "config.objective.optimizer.lrr: unknown key; did you mean 'lr'"),
        ("objective.model.family=nothing", "config.objective.model.family: expected one of"),
        ("objective.model.config.scale=3", "config.objective.model.config.scale: unknown key; did you mean 'scales'"),
        ("steps=many", "config.steps: expected int, got many"),
        ("steps=0", r"config.steps: expected at least 1 step in stage 0 \(reconstruction\), got 0"),
        ("objective.loss.gan=wasserstein", r"loss.gan: expected one of \['hinge', 'non_saturating'\]"),
        ("steps", "override: expected key=value, got steps"),
        ("loss.gan=hinge", "config.loss: expected as config.objective.loss, got the place of an older version"),
        ("objective.loss.semantic=captions", "loss.semantic: captions: expected as .*semantic: contrastive"),
        ("objective.loss.captions.width=32", "loss.captions: expected as config.objective.loss.text_encoder"),
        ("objective.model.fresh=[a]", "model.fresh: expected as config.objective.model.reinit"),
        ("upkeep.every=1", "config.upkeep: expected as config.objective.revival, got the place of an older"),
        ("objective.optimizer.clip=-1", "config.objective.optimizer.clip: expected a number above 0, got -1"),
        ("objective.scale_drop=5", "config.objective.scale_drop: expected a number at least 0 and at most 1"),
        ("max_seconds=.nan", "max_seconds: expected a finite number, got nan"),
        ("objective.loss.semantic=teacher", "config.objective.loss.teacher: expected a teacher"),
    ],
)
def test_bad_configurations_get_one_sentence(override: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read_config(DEBUG, [override])


WEIGHTS = "objective.loss.weights"
DUALVITOK = {
    "objective.model": {"family": "dualvitok", "config": to_mapping(dualvitok_config())},
    "objective.data": {"sources": [{"kind": "scenes"}], "image_size": [64, 64]},
    f"{WEIGHTS}.entropy": 0.0,
    "objective.scale_drop": 0.0,
    "objective.revival.every": 0,
}
MAR = {"objective.model": {"family": "mar", "config": to_mapping(mar_config())}, "objective.data.image_size": [32, 32]}
FSQ = {
    "objective.model.config.quantizer": {"kind": "fsq", "levels": [5, 5, 5], "dim": 24},
    "objective.model.config.dims": [16, 8],
}
BUCKETS = {"min_pixels": 1024, "max_pixels": 4096}
TURNED = {"objective.data": {"sources": [{"kind": "photographs", "turns": True}], "buckets": BUCKETS}}
FOLDERS = [{"kind": "folder", "path": "nowhere", "weight": 1.0}, {"kind": "shards", "path": "nowhere", "weight": 2.0}]
STORED = {"objective.data": {"sources": FOLDERS, "buckets": BUCKETS}}
NO_GAN = {f"{WEIGHTS}.generator": 0.0, "objective.loss.adaptive": False, "objective.loss.gan_start": 0}
NO_GAN |= {"objective.loss.discriminator": {}}


@pytest.mark.parametrize(
    ("edits", "message"),
    [
        (
            {"objective.model.config.quantizer.entropy_temperature": None},
            "weights.entropy: expected a term of this tok",
        ),
        (
            {f"{WEIGHTS}.entropy": 0.0},
            "quantizer.entropy_temperature: expected nothing where loss.weights.entropy is 0",
        ),
        ({f"{WEIGHTS}.semantic": 0.0}, "weights.semantic: expected above 0 where semantic is not none, and only there"),
        ({"objective.loss.semantic": "none"}, "weights.semantic: expected above 0 where semantic is not none"),
        (
            {"objective.loss.semantic": "target", "objective.loss.text_encoder": {}},
            "loss.semantic: expected a term of this",
        ),
        (
            {"objective.loss.teacher": TEACHER},
            "loss.teacher: expected a teacher for semantic: teacher only, got contrastive",
        ),
        ({f"{WEIGHTS}.generator": 0.0}, "loss.adaptive: expected nothing where weights.generator is 0"),
        (NO_GAN | {"objective.discriminator_optimizer": {}}, "discriminator_optimizer: expected nothing where"),
        (NO_GAN | {"objective.loss.gan": "non_saturating"}, "loss.gan: expected nothing where weights.generator is 0"),
        ({"objective.loss.lpips_weights": "x"}, "loss.lpips_weights: expected nothing where weights.perceptual is 0"),
        ({"objective.noise": {}}, "noise: expected nothing (this model has no pixel stream), got some"),
        ({"objective.model.config.scales": [[4, 4]]}, "scale_drop: expected 0 (this model has one scale), got 0.5"),
        (DUALVITOK | {"objective.scale_drop": 0.5}, "scale_drop: expected 0 (this model has one scale), got 0.5"),
        (DUALVITOK | {"objective.revival.every": 5}, "revival.every: expected 0 (no codebook of this model has codes"),
        (DUALVITOK | {f"{WEIGHTS}.entropy": 0.1}, "weights.entropy: expected a term of this dualvitok model"),
        (MAR | {f"{WEIGHTS}.entropy": 0.0}, "weights.semantic: expected a term of this mar model"),
        ({f"{WEIGHTS}.pixl": 1.0}, "weights.pixl: expected a term of this tokenflow model"),
        ({WEIGHTS: {"pixel": 1.0, "semantic": 0.2, "generator": 0.1}}, "weights.codebook: expected a weight for each"),
        (FSQ, "weights.codebook: expected a term of this tokenflow model (its quantizers compute [])"),
        (MAR | {"objective.scale_drop": 0.0}, "expected a term of this mar model"),
        ({"objective.validation": {"images": 3}}, "objective.validation: expected nothing where validate_every is 0"),
        ({"batch_size": 1}, "config.batch_size: expected at least 2 for semantic: contrastive, got 1"),
        ({"objective.data.sources": [{"kind": "photographs"}]}, "data.sources: expected images with captions"),
        (
            {"objective.data.sources": [{"kind": "scenes", "colour": 0.5}]},
            "colour: expected nothing (kind: scenes has",
        ),
        (
            {"objective.data.sources": [{"kind": "text", "zoom": [1, 2]}]},
            "zoom: expected nothing (kind: text has",
        ),
        ({"objective.data.sources": [{"kind": "folder"}]}, "path: expected a folder (kind: folder), got nothing"),
        ({"objective.loss.text_encoder.hard_negatives": 2}, "hard_negatives: expected above 0 where there are swaps"),
        (
            {f"{WEIGHTS}.pixel": 0.0, "objective.loss.pixel": "l2"},
            "loss.adaptive: expected false where weights",
        ),
        (
            {"objective.trainable": ["semantic"], "objective.revival.every": 0},
            "loss.adaptive: expected false where the decoder's last layer is frozen",
        ),
        ({"objective.trainable": ["pixel"]}, "revival.every: expected 0 where the codes of shared are not trainable"),
        (DUALVITOK | TURNED, "data.sources.turns: expected false for images that are not square"),
        (DUALVITOK | STORED, "data.sources: expected one weight of all stored sources, with buckets"),
        (
            {"objective.trainable": ["nothing."]},
            "trainable: expected prefixes of names of parameters that can learn, got ['nothing.']",
        ),
        ({"objective.model.start_from": "nowhere"}, "source: expected a directory written by save"),
    ],
)
def test_nothing_is_silently_without_effect(edits: dict[str, Any], message: str, tmp_path: Path) -> None:
    """A weight without a term, a term without a weight, an option the model does not have: an error before any work."""
    with pytest.raises(ValueError) as caught:
        run(parse_config(tiny(tmp_path / "run", edits)))
    assert message in str(caught.value)
    assert not (tmp_path / "run").exists()


def test_missing_perceptual_weights_are_an_error_before_any_work(tmp_path: Path) -> None:
    edits = {f"{WEIGHTS}.perceptual": 1.0, "objective.loss.lpips_weights": str(tmp_path / "vgg.pth")}
    with pytest.raises(ValueError, match="perceptual weights: expected the VGG16 weights"):
        run(parse_config(tiny(tmp_path, edits)))
    assert not list(tmp_path.iterdir())


def test_validation_keeps_the_best_networks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """PSNR of held-out images rises, then falls: what is kept is the middle; a resumed run remembers its value."""
    values = iter([10.0, 12.0, 11.0, 11.5])
    measured = train.objectives.reconstruction.measure

    def measure(tokenizer: Any, images: torch.Tensor, **options: Any) -> dict[str, float]:
        found = measured(tokenizer, images, **options)
        assert found.keys() == {"psnr", "ssim", "usage"}
        return found | {"psnr": next(values)}

    monkeypatch.setattr("train.objectives.reconstruction.measure", measure)
    edits = {"validate_every": 2, "best": "psnr", "objective.validation.images": 4, "save_every": 6}
    run(parse_config(tiny(tmp_path, {**edits, "steps": 6})))
    best = (tmp_path / "best" / "tokenizer" / "model.safetensors").read_bytes()
    assert best != (tmp_path / "tokenizer" / "model.safetensors").read_bytes()
    state = run(parse_config(tiny(tmp_path, {**edits, "steps": 8})))
    assert state.best == 12.0
    assert (tmp_path / "best" / "tokenizer" / "model.safetensors").read_bytes() == best
    found = [line["validation_psnr"] for line in read_log(tmp_path / "log.jsonl") if "validation_psnr" in line]
    assert found == [10.0, 12.0, 11.0, 11.5]


def test_validation_with_perceptual_weights_keeps_the_lowest_distance(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []
    values = iter([0.5, 0.3, 0.4])

    def distance(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        assert x.shape == y.shape == (4, 3, 32, 32)
        return torch.full((4,), next(values))

    def load(path: str) -> Any:
        asked.append(path)
        return distance

    monkeypatch.setattr("train.objectives.reconstruction.load_lpips", load)
    edits = {"validate_every": 2, "best": "lpips", "objective.validation.images": 4, "save_every": 0, "steps": 6}
    with pytest.raises(ValueError, match=r"validation\.lpips_weights: expected a file, for best: lpips, got nothing"):
        parse_config(tiny(tmp_path, edits))
    state = run(parse_config(tiny(tmp_path, {**edits, "objective.validation.lpips_weights": "vgg.pth"})))
    assert asked == ["vgg.pth"]
    assert state.best == pytest.approx(0.3)
    found = [line["validation_lpips"] for line in read_log(tmp_path / "log.jsonl") if "validation_lpips" in line]
    assert found == pytest.approx([0.5, 0.3, 0.4])


DINO = {"kind": "dino", "name": "vit_tiny_patch16_224", "options": TOWER, "pretrained": False, "blocks": [0]}


@pytest.mark.parametrize(("gan", "kind"), [("hinge", "patchgan"), ("non_saturating", "patchgan"), ("hinge", "dino")])
def test_the_discriminator_is_seen_to_learn(gan: str, kind: str, tmp_path: Path) -> None:
    """Against a generator that stands still: its loss falls, by its own optimizer, with its regularisers."""
    edits: dict[str, Any] = {
        "steps": 12,
        "objective.optimizer.lr": 0.0,
        "objective.discriminator_optimizer": {"lr": 0.01},
        "objective.loss.gan": gan,
        "objective.loss.gan_start": 0,
        "objective.loss.lecam": 0.001,
        "objective.loss.r1": 0.001,
        "objective.revival.every": 0,
        "objective.model.config.semantic_encoder.options.drop_path_rate": 0.0,
    }
    if kind == "dino":
        edits |= {"objective.loss.discriminator": DINO, "objective.loss.r1": 0.0}
    state = build_state(parse_config(tiny(tmp_path, edits)), Accelerator(cpu=True))
    batch = next(state.objective.batches(0, 0))
    learning = [p for p in state.objective.networks["discriminator"].parameters() if p.requires_grad]
    before = [p.detach().clone() for p in learning]
    reports = [train_step(state, [batch])[0] for _ in range(12)]
    losses = [report["discriminator"] for report in reports]
    assert losses[-1] < 0.6 * losses[0]
    assert all(report["lecam"] >= 0 and report.get("r1", 1.0) > 0 for report in reports)
    assert all(not torch.equal(a, b) for a, b in zip(before, learning, strict=True))
    assert all(p.requires_grad for p in learning)
    means = state.objective.state_dict()["adversary"]
    assert float(means["real"]) > float(means["fake"])  # real images got higher logits


@pytest.mark.parametrize("action", ["stop", "skip"])
def test_values_that_are_not_finite_name_their_module(action: str, tmp_path: Path) -> None:
    state = build_state(parse_config(tiny(tmp_path, {"non_finite": action})), Accelerator(cpu=True))
    tokenizer = state.objective.networks["tokenizer"]
    weight = dict(tokenizer.named_parameters())["pixel_embed.weight"]
    hook = weight.register_hook(lambda grad: grad * torch.nan)
    before = {name: p.detach().clone() for name, p in tokenizer.named_parameters()}
    batch = Batch(torch.zeros(2, 3, 32, 32), ["", ""], [])
    if action == "stop":
        with pytest.raises(
            FloatingPointError, match=r"gradients of tokenizer.pixel_embed.weight are not finite at step 0"
        ):
            train_step(state, [batch])
    else:
        report, _ = train_step(state, [batch])
        assert report["skipped_steps"] == 1.0
        assert state.step == 1
    assert all(torch.equal(p, before[name]) for name, p in tokenizer.named_parameters())
    hook.remove()


def test_a_teacher_and_trainable_prefixes(tmp_path: Path) -> None:
    edits: dict[str, Any] = {
        "steps": 2,
        "ema": 0.0,
        "objective.loss.semantic": "teacher",
        "objective.loss.teacher": TEACHER,
        "objective.loss.text_encoder": {},
        "objective.trainable": ["pixel_decoder.", "semantic_decoder."],
        "objective.revival.every": 0,
        "objective.model.config.quantizer.entropy_temperature": None,
    }
    edits |= {f"{WEIGHTS}.{term}": 0.0 for term in ("codebook", "commitment", "entropy")}
    data = tiny(tmp_path / "run", edits)
    state = run(parse_config(data))
    assert read_log(tmp_path / "run" / "log.jsonl")[-1]["semantic"] > 0
    fresh = build_state(parse_config(data), Accelerator(cpu=True)).averaged.state_dict()
    for name, tensor in state.averaged.state_dict().items():
        moved = not torch.equal(tensor, fresh[name])
        assert moved == name.startswith(("pixel_decoder.", "semantic_decoder.")) or not tensor.is_floating_point(), name


def test_bf16_autocast_trains(tmp_path: Path) -> None:
    """Networks in bfloat16; weights and the reported losses stay in float32 and near those of a float32 run."""
    losses = {}
    for precision in ("fp32", "bf16"):
        AcceleratorState._reset_state(True)  # it allows one precision per process
        state = run(parse_config(tiny(tmp_path / precision, {"precision": precision, "steps": 3})))
        assert {p.dtype for p in state.objective.networks["tokenizer"].parameters()} == {torch.float32}
        losses[precision] = read_log(tmp_path / precision / "log.jsonl")[-1]
    AcceleratorState._reset_state(True)
    assert losses["bf16"]["pixel"] != losses["fp32"]["pixel"]
    assert losses["bf16"]["pixel"] == pytest.approx(losses["fp32"]["pixel"], rel=0.05)


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*.yaml")), ids=lambda path: path.stem)
def test_check_prints_everything_and_touches_nothing(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main([str(path), "--check", "keep=7"]) == 0
    out = capsys.readouterr().out
    assert "keep: 7" in out
    assert "kind: " in out
    assert "weight_decay: " in out
    assert "# tokenizer" in out or "# encoder" in out
    assert not list(tmp_path.iterdir())
