"""Joint tuning: what learns in each stage, and what the guard does. Resume, kills, ranks: test_every_objective.py."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from transformers import AutoModelForCausalLM

import tokenizers_mm as tmm
import train.loop
from benchmarks.tiny import tokenflow_config as tiny_config
from tests.cases import ROOT
from tests.llm.fakes import words
from tests.train.kinds import assert_same, final
from tokenizers_mm.data.scenes import make_scene
from tokenizers_mm.data.sources import Batch
from tokenizers_mm.eval.image import psnr
from tokenizers_mm.eval.validation import held_out, reconstruct
from tokenizers_mm.llm import FeatureProjector, MultimodalProcessor, Segment, VisualVocabulary
from tokenizers_mm.models import TokenFlow
from train.__main__ import main
from train.config import RunConfig, read_config
from train.log import read_log
from train.loop import run
from train.objectives.guard import Guard, GuardConfig
from train.objectives.joint import PARTS
from train.state import State, build_state
from train.step import train_step, weighted_sum

CONFIG = str(ROOT / "configs" / "joint_debug.yaml")
pytestmark = pytest.mark.usefixtures("one_thread")
NO_GAN = ["objective.loss.weights.generator=0", "objective.loss.adaptive=false", "objective.loss.gan_start=0"]
NO_GAN += ["objective.loss.discriminator={channels: 64, num_layers: 3}"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tokenizer and a text tokenizer."""
    place = tmp_path_factory.mktemp("joint")
    torch.manual_seed(0)
    quantizer = dataclasses.replace(tiny_config().quantizer, entropy_temperature=0.05)
    config = dataclasses.replace(tiny_config(), quantizer=quantizer)
    TokenFlow.from_config(config).eval().save(place / "tokenizer")
    words([make_scene(index).caption for index in range(100)]).save_pretrained(str(place / "text"))
    return place


def arguments(folder: Path, out: Path, *overrides: str) -> list[str]:
    text = f"objective.language_model.text_tokenizer={folder / 'text'}"
    return [CONFIG, f"out={out}", f"objective.tokenizer={folder / 'tokenizer'}", text, *overrides]


def stages(*which: tuple[str, int], lr: float = 0.003, tokenizer_lr: float = 0.0005) -> str:
    """Constant rates, so that a stage does not depend on its length."""
    learning = {"align": ("projector",), "joint": PARTS, "chat": ("projector", "language_model")}
    rows = []
    for name, steps in which:
        rates = ", ".join(f"{p}: {{lr: {tokenizer_lr if p == 'tokenizer' else lr}}}" for p in learning[name])
        rows.append(f"{{stage: {name}, steps: {steps}, {rates}}}")
    return f"objective.stages=[{', '.join(rows)}]"


def configured(folder: Path, out: Path, *overrides: str) -> RunConfig:
    path, *rest = arguments(folder, out, *overrides)
    return read_config(path, rest)


def built(folder: Path, out: Path, *overrides: str) -> State:
    return build_state(configured(folder, out, *overrides), Accelerator(cpu=True))


def means(out: Path, stage: int) -> list[float]:
    return [line["caption"] for line in read_log(out / "log.jsonl") if line.get("stage") == stage]


def looks(out: Path) -> list[dict[str, Any]]:
    return [line for line in read_log(out / "log.jsonl") if "guard" in line]


def quality(tokenizer: Any, count: int = 8) -> float:
    pictures = held_out("", count, (32, 32))
    return float(psnr(pictures, reconstruct(tokenizer, pictures)[0]).mean())


def test_captions_are_learned_in_stage_one_and_further_in_stage_two(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    plan = stages(("align", 40), ("joint", 20), ("chat", 4), lr=0.01)
    assert main(arguments(folder, out, plan, "log_every=4")) == 0
    first, second = means(out, 0), means(out, 1)
    assert first[-1] < first[0] - 0.05
    assert second[-1] < first[-1] - 0.5
    lines = read_log(out / "log.jsonl")
    assert {"vq", "pixel", "psnr", "generator", "discriminator", "usage_shared"} <= {n for line in lines for n in line}
    guard = looks(out)
    assert [(line["step"], line["guard"]) for line in guard] == [
        (40, "before"), (45, "within"), (50, "within"), (55, "within"), (60, "within"),
    ]  # fmt: skip
    assert all(line["guard_rfid"] is None and "was not measured" in line["guard_rfid_missing"] for line in guard)

    tokenizer = tmm.load(out / "tokenizer")
    assert quality(tokenizer) == pytest.approx(guard[-1]["guard_psnr"], abs=1e-6)
    model: Any = AutoModelForCausalLM.from_pretrained(out)
    projector = FeatureProjector.load(out)
    from transformers import AutoTokenizer

    from tokenizers_mm.llm.projector import embed

    processor = MultimodalProcessor(tokenizer, AutoTokenizer.from_pretrained(out), VisualVocabulary.load(out))
    scene = make_scene(5)
    row = [[Segment(scene.render(32), learn=False, as_features=True), scene.caption]]
    with torch.no_grad():
        loss = float(model(**embed(model, processor(row), projector)).loss)
    assert loss < second[0]


def entered(folder: Path, out: Path, stage: int, *overrides: str) -> State:
    state = built(folder, out, *overrides)
    state.enter(stage)
    return state


@pytest.mark.parametrize("index", [0, 1, 2])
def test_gradients_by_stage(folder: Path, tmp_path: Path, index: int) -> None:
    """Stage 1: the projector's alone. Stage 2: all. Stage 3: all but the tokenizer's."""
    state = entered(folder, tmp_path, index, "objective.alpha=0", *NO_GAN)
    objective: Any = state.objective
    batch = next(objective.batches(index, 0))
    terms, _ = objective.losses("parts", batch, state.moment())
    weighted_sum(terms, objective.weights("parts", state.moment())).backward()
    for part in PARTS:
        module, learns = objective.networks[part], part in objective.learning(index)
        touched = {n for n, p in module.named_parameters() if p.grad is not None and p.grad.abs().max() > 0}
        assert bool(touched) == learns, part
        assert module.training == learns
        if part == "tokenizer" and index == 1:  # alpha 0 leaves the caption's gradient
            before_codes = ("semantic_encoder.", "pixel_encoder.", "semantic_head.", "pixel_head.")
            assert touched
            assert all(name.startswith(before_codes) for name in touched)


def test_a_step_goes_down_the_weighted_sum(folder: Path, tmp_path: Path) -> None:
    """Against L_cap + alpha * (pixel + codebook + 0.25 commitment + 0.01 entropy) taken apart, and its gradient."""
    state = entered(folder, tmp_path, 1, "objective.alpha=0.7", *NO_GAN)
    objective: Any = state.objective
    batch = next(objective.batches(1, 0))
    terms, _ = objective.losses("parts", batch, state.moment())
    own = terms["pixel"] + terms["codebook"] + 0.25 * terms["commitment"] + 0.01 * terms["entropy"]
    loss = terms["caption"] + 0.7 * own
    grads = torch.autograd.grad(loss, objective.learnable["tokenizer"], allow_unused=True)
    norm = torch.cat([grad.flatten() for grad in grads if grad is not None]).norm()
    report, _ = train_step(state, [batch])
    assert report["loss"] == pytest.approx(float(loss.detach()), rel=1e-5)
    assert report["vq"] == pytest.approx(float(own.detach()), rel=1e-5)
    assert report["grad_norm_tokenizer"] == pytest.approx(float(norm), rel=1e-4)


def test_micro_batches_equal_a_large_batch(folder: Path, tmp_path: Path) -> None:
    """Captions of different lengths, and one image without one; the entropy, which mixes samples, is off."""
    images = torch.rand(4, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
    captions = ["a large red circle", "", "a small", "a large blue square at the top left on black"]
    results = []
    for parts in (1, 2):
        state = entered(folder, tmp_path / str(parts), 1, *NO_GAN, "objective.loss.weights.entropy=0")
        step = 4 // parts
        batches = [Batch(images[i : i + step], captions[i : i + step], []) for i in range(0, 4, step)]
        report, _ = train_step(state, batches)
        results.append([report[name] for name in ("loss", "caption", "vq", *(f"grad_norm_{part}" for part in PARTS))])
    assert results[0] == pytest.approx(results[1], rel=1e-4)


def test_frozen_parts_stay_as_they_are(folder: Path, tmp_path: Path) -> None:
    objective = run(configured(folder, tmp_path, stages(("align", 3), ("chat", 3)))).objective
    fresh = built(folder, tmp_path / "fresh", stages(("align", 3), ("chat", 3))).objective
    same = {
        part: all(
            torch.equal(a, b)
            for a, b in zip(objective.networks[part].parameters(), fresh.networks[part].parameters(), strict=True)
        )
        for part in PARTS
    }
    assert same == {"tokenizer": True, "projector": False, "language_model": False}


@pytest.mark.parametrize("action", ["stop", "freeze"])
def test_the_guard_keeps_the_last_good_tokenizer(
    folder: Path, tmp_path: Path, action: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Two gentle looks, then a reconstruction destroyed by a huge rate of the tokenizer."""
    gentle = "{stage: joint, steps: 4, tokenizer: {lr: 0.0001}, projector: {lr: 0.001}, language_model: {lr: 0.001}}"
    wild = "{stage: joint, steps: 6, tokenizer: {lr: 1.0}, projector: {lr: 0.001}, language_model: {lr: 0.001}}"
    last = "{stage: chat, steps: 2, language_model: {lr: 0.001}}"
    plan = [f"objective.stages=[{gentle}, {wild}, {last}]", *NO_GAN, "log_every=1"]
    plan += [f"objective.guard={{every: 2, pictures: 8, max_psnr_drop: 1.0, action: {action}}}"]
    assert main(arguments(folder, tmp_path, *plan)) == 0
    guard = looks(tmp_path)
    assert [line["guard"] for line in guard] == ["before", "within", "within", action]
    assert guard[-1]["guard_psnr_drop"] > 1.0
    assert guard[-1]["guard_good_step"] == 4
    saved = quality(tmm.load(tmp_path / "tokenizer"))
    assert saved == pytest.approx(guard[2]["guard_psnr"], abs=1e-6)
    assert saved > guard[0]["guard_psnr"] - 1.0
    steps = [line["step"] for line in read_log(tmp_path / "log.jsonl")]
    assert max(steps) == (6 if action == "stop" else 12)
    error = capsys.readouterr().err
    verb = "stopped" if action == "stop" else "goes on"
    assert f"joint tuning {verb} at step 6: PSNR fell by" in error
    assert "as at step 4" in error
    if action == "stop":  # and a second call changes nothing
        before = (tmp_path / "model.safetensors").read_bytes()
        assert main(arguments(folder, tmp_path, *plan)) == 0
        assert (tmp_path / "model.safetensors").read_bytes() == before
        assert len(looks(tmp_path)) == 4


def test_a_run_goes_on_after_its_tokenizer_was_frozen(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped in the stage of the freeze and in the one after; it ends as the run that was left alone."""
    wild = "{stage: joint, steps: 4, tokenizer: {lr: 1.0}, projector: {lr: 0.001}, language_model: {lr: 0.001}}"
    again = "{stage: joint, steps: 3, tokenizer: {lr: 0.001}, projector: {lr: 0.001}}"
    plan = [f"objective.stages=[{wild}, {again}]", *NO_GAN, "save_every=1"]
    plan += ["objective.guard={every: 2, pictures: 4, max_psnr_drop: 1.0, action: freeze}"]
    whole = train.loop.train_step
    run(configured(folder, tmp_path / "whole", *plan))
    for cut in (3, 5):

        def step(state: State, batches: Any, until: int = cut) -> Any:
            if state.step == until:
                raise KeyboardInterrupt
            return whole(state, batches)

        monkeypatch.setattr(train.loop, "train_step", step)
        with pytest.raises(KeyboardInterrupt):
            run(configured(folder, tmp_path / "parts", *plan))
    monkeypatch.setattr(train.loop, "train_step", whole)
    state = run(configured(folder, tmp_path / "parts", *plan))
    assert state.objective.guard.frozen  # type: ignore[attr-defined]
    assert_same(final(tmp_path / "whole"), final(tmp_path / "parts"))


def test_rfid_crosses_the_bound(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    values = iter([2.0, 2.9, 3.1])

    class Distance:
        def __init__(self, setup: Any) -> None:
            assert setup.weights == {"inception": "weights.pth"}

        def update(self, batch: Any) -> None:
            assert batch.originals.shape == batch.reconstructions.shape

        def result(self) -> dict[str, float]:
            return {"mean": next(values)}

    monkeypatch.setattr("tokenizers_mm.eval.validation.RFID", Distance)
    config = GuardConfig(inception="weights.pth", max_fid_ratio=1.5, action="freeze", pictures=8)
    guard = Guard(config, held_out("", 8, (32, 32)))
    parts = {"tokenizer": tmm.load(folder / "tokenizer")}
    lines = [guard.measure(parts, step) for step in range(3)]
    assert [line["guard"] for line in lines] == ["before", "within", "freeze"]
    assert lines[1]["guard_rfid"] == 2.9
    assert "guard_rfid_missing" not in lines[1]
    assert guard.crossed == "rFID rose 1.55-fold (bound 1.5)"


def test_records_in_the_last_stage_and_folders_of_captions(folder: Path, tmp_path: Path) -> None:
    for index in range(4):
        scene = make_scene(index)
        scene.render(40).save(tmp_path / f"{index}.png")
        (tmp_path / f"{index}.txt").write_text(scene.caption if index else "")
    rows = [{"content": [{"image": f"{i}.png", "features": True}, {"text": make_scene(i).caption}]} for i in range(4)]
    (tmp_path / "rows.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    for index in range(4):
        make_scene(index).render(32).save(tmp_path / f"{index}.png")
    chat = f"{{stage: chat, steps: 6, language_model: {{lr: 0.01}}, records: [{{path: {tmp_path}/rows.jsonl}}]}}"
    data = f"objective.data.sources=[{{kind: folder, path: {tmp_path}}}]"
    plan = [f"objective.stages=[{{stage: align, steps: 2, projector: {{lr: 0.01}}}}, {chat}]", data, "accumulate=2"]
    assert main(arguments(folder, tmp_path / "run", *plan, "log_every=1", "batch_size=1")) == 0
    talk = means(tmp_path / "run", 1)
    assert talk[-1] < talk[0]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["objective.alfa=1"], "config.objective.alfa: unknown key; did you mean 'alpha'?"),
        (["objective.alpha=-1"], "config.objective.alpha: expected"),
        (["objective.stages=[]"], "config.objective.stages: expected at least one stage, got none"),
        (
            ["objective.stages=[{stage: align, steps: 1}]"],
            "config.objective.stages[0]: expected an optimizer for one of",
        ),
        (
            ["objective.stages=[{stage: chat, steps: 0, projector: {}}]"],
            "config.objective.stages[0].steps: expected",
        ),
        (["objective.stages=[{stage: chat, steps: 1, tokenizer: {}}]"], "expected no optimizer for the tokenizer"),
        (
            ["objective.stages=[{stage: joint, steps: 1, tokenizer: {}}]"],
            "expected optimizers for the tokenizer and another",
        ),
        (
            ["objective.guard.action=wait"],
            "config.objective.guard.action: expected one of ['stop', 'freeze'], got wait",
        ),
        (["objective.guard.every=0"], "config.objective.guard.every: expected"),
        (["objective.guard.folder=nowhere"], "images: expected a folder, got 'nowhere'"),
        (
            ["objective.data.sources=[{kind: photographs}]"],
            "config.objective.data.sources: expected images with captions",
        ),
        (["batch_size=0"], "config.batch_size: expected"),
        (["precision=fp16"], "config.precision: expected fp32 or bf16 for joint tuning, got fp16"),
        (["objective.tokenizer=nowhere"], "source: expected a directory written by save"),
        (["objective.projector_from=nowhere"], "nowhere/projector.json: expected"),
    ],
)
def test_bad_configurations_get_one_sentence(
    folder: Path, tmp_path: Path, overrides: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments(folder, tmp_path / "run", *overrides)) == 2
    error = capsys.readouterr().err.strip()
    assert message in error
    assert "\n" not in error
    assert not (tmp_path / "run").exists()


def test_the_realistic_file_is_valid(tmp_path: Path) -> None:
    for name in ("captioned", "val"):
        (tmp_path / name).mkdir()
        make_scene(0).render(32).save(tmp_path / name / "0.png")
        (tmp_path / name / "0.txt").write_text("a picture")
    data = f"objective.data.sources=[{{kind: folder, path: {tmp_path / 'captioned'}}}]"
    config = read_config(str(ROOT / "configs" / "joint_tokenflow.yaml"), [data])
    assert [stage.stage for stage in config.objective.stages] == ["align", "joint", "chat"]
    assert config.batch_size * config.accumulate * 8 == 1024
