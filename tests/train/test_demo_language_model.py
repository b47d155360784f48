"""The demo's second half at a tiny size: every part runs and leaves what it says."""

import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.llm.fakes import multi_scale
from tokenizers_mm.data.scenes import Scene, SceneObject, make_scene
from tokenizers_mm.llm import FeatureProjector, VisualVocabulary
from train.demo import judgement, language_model
from train.demo.judgement import draw_each, measure_language_model, reward_each, understand
from train.demo.language_model import Bridge, Lessons, code_vectors, make_lessons, make_processor, teach, tell_loss


@pytest.fixture(autouse=True)
def small(one_thread: None, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"DRAWN": 4, "TOLD": 4}.items():
        monkeypatch.setattr(language_model, name, value)
    for name, value in {"NUM_HELDOUT": 8, "TOGETHER": 4, "SHOWN": 4, "CANDIDATES": 2}.items():
        monkeypatch.setattr(judgement, name, value)


def test_it_trains_asks_and_draws(tmp_path: Path) -> None:
    bridge, report = teach(multi_scale(), tmp_path, 12, 64)
    summary = measure_language_model(bridge, multi_scale(), tmp_path) | report
    assert summary["parse_rate"] == 1.0
    assert 0 <= summary["generation_accuracy"] <= 1
    assert 0 <= summary["understanding_accuracy"] <= 1
    assert summary["bridge_steps"] == 12
    json.dumps(summary)
    with Image.open(tmp_path / "generation.png") as sheet:
        assert sheet.width > 100
    assert len((tmp_path / "understanding.md").read_text().splitlines()) == 4 + 4
    folder = tmp_path / "language_model"
    model: Any = AutoModelForCausalLM.from_pretrained(folder)
    text = AutoTokenizer.from_pretrained(folder)
    vocabulary = VisualVocabulary.load(folder)
    assert len(text) == vocabulary.text_size
    assert len(model.get_input_embeddings().weight) == vocabulary.size  # pyright: ignore[reportArgumentType]
    bridge = Bridge(multi_scale(), make_processor(multi_scale()))
    bridge.scales.load_state_dict(load_file(folder / "scales.safetensors"))
    assert FeatureProjector.load(folder).config == bridge.projector.config


def test_a_taught_model_draws_what_it_was_taught_and_rewards_it() -> None:
    """Two grey levels for two scenes: each caption's picture is drawn, and is rewarded more than the other's."""
    torch.manual_seed(0)
    tokenizer = multi_scale()
    bridge = Bridge(tokenizer, make_processor(tokenizer))
    scenes = [
        Scene((SceneObject("circle", "red", (0.5, 0.5), 0.3),), "black"),
        Scene((SceneObject("square", "white", (0.5, 0.5), 0.3),), "grey"),
    ]
    captions = [scene.caption for scene in scenes]
    levels = torch.tensor([-0.9, 0.9])
    codes: Any = tokenizer.encode(levels.view(2, 1, 1, 1).expand(-1, 3, 16, 16).contiguous())
    lessons = Lessons(scenes, codes.ids, tokenizer.features(codes).detach(), (16, 16))
    rng, optimizer = random.Random(0), torch.optim.AdamW(bridge.parameters(), 3e-3)
    for _ in range(120):
        (bridge.drawing_loss([*captions, "", ""], codes.ids.repeat(2, 1)) + tell_loss(bridge, lessons, rng)).backward()
        optimizer.step()
        optimizer.zero_grad()
    bridge.eval()
    drawn = draw_each(bridge, captions * 2, torch.Generator().manual_seed(0))
    pictures = [picture for picture in drawn if picture is not None]
    assert len(pictures) == len(drawn)
    means = [tokenizer.encode(picture).ids.float().mean() for picture in pictures]
    assert [float(mean) for mean in means] == [0.0, 7.0, 0.0, 7.0]
    right, wrong = (reward_each(bridge, drawn[:2], told) for told in (scenes, scenes[::-1]))
    assert min(right) > 3 * max(wrong)
    assert reward_each(bridge, [None, drawn[1]], scenes) == [-1.0, pytest.approx(right[1], abs=1e-5)]
    assert [row[2] for row in understand(bridge, lessons)] == [(caption, caption) for caption in captions]


def test_rows_begin_from_the_codes() -> None:
    tokenizer = multi_scale()
    vectors = code_vectors(tokenizer)
    assert vectors[:, 0].tolist() == pytest.approx([(i + 0.5) / 8 * 2 - 1 for i in range(8)])
    bridge = Bridge(tokenizer, make_processor(tokenizer))
    rows = bridge.model.get_input_embeddings().weight[bridge.first_id : bridge.first_id + 8]
    steps = (rows[1:] - rows[:-1]).norm(dim=1)
    torch.testing.assert_close(steps, steps.mean().expand(7), atol=1e-5, rtol=0)  # equal steps stay equal


def test_lessons_are_the_scenes() -> None:
    tokenizer = multi_scale()
    scenes = [make_scene(index) for index in range(3)]
    lessons = make_lessons(tokenizer, scenes)
    one: Any = tokenizer.encode(scenes[2].render(16))
    assert torch.equal(lessons.ids[2:], one.ids)
    torch.testing.assert_close(lessons.features[2:], tokenizer.features(one))
