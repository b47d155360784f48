"""The demo's second half at a tiny size: every part runs and leaves what it says."""

import json
from pathlib import Path

import pytest
import torch
from PIL import Image
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.llm.fakes import multi_scale
from tokenizers_mm.llm import VisualVocabulary
from train import demo_bridge
from train.demo_bridge import bridge_demo, code_vectors, make_model, make_processor


def test_it_trains_asks_and_draws(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"NUM_SCENES": 64, "NUM_HELDOUT": 8, "BATCH": 4, "CHUNK": 4, "SHOWN": 4}.items():
        monkeypatch.setattr(demo_bridge, name, value)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    summary = bridge_demo(multi_scale(), tmp_path, 1.0)
    torch.set_num_threads(threads)
    assert summary["parse_rate"] == 1.0
    assert 0 <= summary["generation_accuracy"] <= 1
    assert 0 <= summary["understanding_accuracy"] <= 1
    assert summary["bridge_steps"] > 0
    json.dumps(summary)
    with Image.open(tmp_path / "generation.png") as sheet:
        assert sheet.width > 100
    assert len((tmp_path / "understanding.md").read_text().splitlines()) == 4 + 4
    folder = tmp_path / "language_model"
    model, text = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    vocabulary = VisualVocabulary.load(folder)
    assert len(text) == vocabulary.text_size
    assert len(model.get_input_embeddings().weight) == vocabulary.size  # pyright: ignore[reportArgumentType]


def test_rows_begin_from_the_codes() -> None:
    tokenizer = multi_scale()
    vectors = code_vectors(tokenizer)
    assert vectors[:, 0].tolist() == pytest.approx([(i + 0.5) / 8 * 2 - 1 for i in range(8)])
    model, processor = make_model(tokenizer, make_processor(tokenizer)), make_processor(tokenizer)
    start = processor.vocabulary.codes[0].start
    rows = model.get_input_embeddings().weight[start : start + 8]
    steps = (rows[1:] - rows[:-1]).norm(dim=1)
    torch.testing.assert_close(steps, steps.mean().expand(7), atol=1e-5, rtol=0)  # equal steps stay equal
