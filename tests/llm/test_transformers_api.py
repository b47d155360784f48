"""Calls of language models: each name of the cache, wrappers, positions that do not arrive, files with code."""

import ast
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from torch import Tensor, nn

from tests.cases import ROOT
from tests.llm.fakes import byte_level, one_scale
from tokenizers_mm.llm import Grammar, MultimodalProcessor, VisualVocabulary, generate
from tokenizers_mm.llm import transformers_api as api


class Counting(nn.Module):
    """A language model whose logits say how many tokens it has seen; `name` is that of its cache, out and in."""

    def __init__(self, rows: int) -> None:
        super().__init__()
        self.table = nn.Embedding(rows, 4)
        self.output = nn.Linear(4, rows)
        self.lengths: list[tuple[int, int]] = []

    def get_input_embeddings(self) -> nn.Module:
        return self.table

    def get_output_embeddings(self) -> nn.Module:
        return self.output

    def step(self, name: str, input_ids: Tensor, cache: list[Tensor] | None) -> SimpleNamespace:
        self.lengths.append((input_ids.shape[1], 0 if cache is None else len(cache)))
        kept = [*(cache or []), *input_ids.unbind(1)]
        return SimpleNamespace(**{"logits": self.output(self.table(input_ids)), name: kept})


class WithCache(Counting):
    def forward(self, input_ids: Any, attention_mask: Any, position_ids: Any, use_cache: Any, cache: Any = None) -> Any:
        return self.step("cache", input_ids, cache)


class WithPast(Counting):
    def forward(
        self, input_ids: Any, attention_mask: Any, position_ids: Any, use_cache: Any, past_key_values: Any = None
    ) -> Any:
        return self.step("past_key_values", input_ids, past_key_values)


class WithState(Counting):
    def forward(
        self, input_ids: Any, attention_mask: Any, position_ids: Any, use_cache: Any, cache_params: Any = None
    ) -> Any:
        return self.step("cache_params", input_ids, cache_params)


@pytest.mark.parametrize("kind", [WithCache, WithPast, WithState])
def test_a_cache_goes_in_and_out_under_the_name_that_the_model_has(kind: Any) -> None:
    vocabulary = VisualVocabulary.for_tokenizer(one_scale(), byte_level())
    processor = MultimodalProcessor(one_scale(), byte_level(), vocabulary)
    model = kind(vocabulary.size).eval()
    prompts = processor([["ab", processor.opening()]], end=False, side="left")
    ids = generate(model, prompts, Grammar(vocabulary, "image", processor.eos))
    start = prompts.input_ids.shape[1]
    assert model.lengths == [(start, 0), *((1, start + done) for done in range(ids.shape[1] - 1))]


def test_a_model_without_a_cache_is_refused_with_its_name() -> None:
    class Plain(Counting):
        def forward(self, input_ids: Tensor, attention_mask: Any, position_ids: Any) -> Any:
            return self.step("nothing", input_ids, None)

    model = Plain(8)
    with pytest.raises(ValueError, match=r"model: expected one that takes keys and values as cache or .*, got Plain"):
        api.cache_name(model)


def test_a_cache_that_cannot_forget_is_refused() -> None:
    with pytest.raises(ValueError, match="language_model: expected a cache that can be cropped, got list"):
        api.keep_for_rewind([])
    fixed = SimpleNamespace(is_croppable=False, crop=lambda count: None)
    with pytest.raises(ValueError, match="language_model: expected a cache that can be cropped, got SimpleNamespace"):
        api.keep_for_rewind(fixed)


MOVING = {
    *api.CACHE_NAMES[1:],
    "torch_dtype",
    "rope_parameters",
    "rope_theta",
    "rope_scaling",
    "get_decoder",
    "resize_token_embeddings",
    "get_output_embeddings",
    "tie_weights",
    "local_files_only",
    "trust_remote_code",
}


def test_no_other_file_knows_the_moving_names() -> None:
    """Arguments and attributes of `transformers` that were renamed, or may be, and whatever reads its files."""
    for folder in ("tokenizers_mm", "train", "benchmarks"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            if path.name in ("transformers_api.py", "_transformers.py"):
                continue
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                names = {node.attr} if isinstance(node, ast.Attribute) else set()
                names |= {node.arg or ""} if isinstance(node, ast.keyword) else set()
                assert not names & MOVING, f"{path}:{node.lineno}"  # type: ignore[attr-defined]
                called = isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)
                if called and node.func.attr == "from_pretrained":  # type: ignore[union-attr]
                    assert "Auto" not in ast.unparse(node.func), f"{path}:{node.lineno}"  # type: ignore[union-attr]


def folder_with_code(folder: Path) -> Path:
    """A model and a text tokenizer that want code of their own to run; it leaves a file behind when it does."""
    folder.mkdir()
    mark = f"from pathlib import Path\nPath({str(folder / 'ran')!r}).touch()\n"
    for name in ("configuration_own", "modeling_own", "tokenization_own"):
        (folder / f"{name}.py").write_text(mark + "class Own:\n    pass\n")
    auto = {"AutoConfig": "configuration_own.Own", "AutoModelForCausalLM": "modeling_own.Own"}
    (folder / "config.json").write_text(json.dumps({"model_type": "own", "auto_map": auto}))
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "Own", "auto_map": {"AutoTokenizer": ["tokenization_own.Own", None]}})
    )
    return folder


def test_code_beside_a_model_is_neither_run_nor_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def asked(*arguments: Any) -> str:
        raise AssertionError("the user was asked")

    monkeypatch.setattr("builtins.input", asked)
    folder = folder_with_code(tmp_path / "model")
    with pytest.raises(ValueError, match="source: expected a causal language model, got"):
        api.load_language_model(folder, "source")
    with pytest.raises(ValueError, match="text: expected a text tokenizer, got"):
        api.load_text_tokenizer(folder, "text")
    with pytest.raises(ValueError, match="kind: expected a causal language model, got"):
        api.new_language_model("own", "kind", {"auto_map": {"AutoModelForCausalLM": f"{folder}--modeling_own.Own"}})
    assert not (folder / "ran").exists()
